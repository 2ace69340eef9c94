"""Optuna's samplers behind the Strategy contract: NSGA-II [Deb2002], NSGA-III, multivariate TPE.

Suggestions are sampled in a study in memory that lives as long as the strategy; the run's record
is another study and none of this file's business.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from search.evaluation import Evaluation, excess, within
from search.strategies.proposals import Genome, fresh_batch
from search.strategies.random_search import stratified
from search.strategies.ranking import non_dominated_ranks
from search.strategy import Context, Strategy, Traits, batch_generator

if TYPE_CHECKING:
    import optuna

GRANULARITY = ("layer", "group", "channel")
WORST = 1e6  # stands for a loss that is not finite; Optuna takes no NaN
LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class SamplerSettings(Strategy.Settings):
    """Settings of all three.

    Attributes:
        population: candidates of a generation; TPE starts after as many.
        warm_start: begin with what the run has measured already.
    """

    population: int = 24
    warm_start: bool = True

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population must be at least 2, got {self.population}")


class OptunaSampler(Strategy):
    """Asks a batch, repairs it to the budgets, evaluates, tells the genes that were evaluated.

    A gene is an integer: the position in its legal widths. The objectives are log10 of the loss
    (the order is the same, the crowding distance more even) and log2 of the size; every budget
    is a constraint cost / limit - 1 <= 0. The sampler is made anew for each batch with a seed of
    (run's seed, batch), so that nothing random is carried.
    """

    Settings = SamplerSettings
    settings: SamplerSettings

    @abstractmethod
    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """The sampler of one batch."""

    def run(self, context: Context) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=self.sampler(context.seed)
        )
        known = context.history() if self.settings.warm_start else []
        seen = {evaluation.candidate for evaluation in known}
        self._start(study, context, known)
        batch = 0
        while not context.should_stop():
            generator = batch_generator(context.seed, batch, self.name)
            study.sampler = self.sampler(int(generator.integers(2**31)))
            wishes, generation = self._ask(study, context, generator)
            fresh = fresh_batch(context, wishes, seen, generator)
            if not fresh:
                return
            evaluations = context.evaluate([context.space.decode(genome) for genome in fresh])
            for genome, evaluation in zip(fresh, evaluations, strict=True):
                self._tell(study, context, genome, evaluation, generation)
            batch += 1

    def _start(self, study: optuna.Study, context: Context, known: Sequence[Evaluation]) -> None:
        """The first generation: the best feasible evaluations so far, front by front."""
        plain = [e for e in known if not e.recipe and not e.pruned]
        usable = [e for e in plain if within(context.budgets, e.costs) and np.isfinite(e.loss)]
        points = np.array([(e.loss, e.size_bytes) for e in usable]).reshape(-1, 2)
        ranks = non_dominated_ranks(points)
        for at in np.argsort(ranks, kind="stable")[: self.settings.population]:
            genome = context.space.encode(usable[at].candidate)
            if context.space.decode(genome).layers == usable[at].candidate.layers:
                self._tell(study, context, genome, usable[at], 0)

    def _ask(
        self, study: optuna.Study, context: Context, generator: np.random.Generator
    ) -> tuple[list[Genome], int]:
        """Suggestions for one batch and their generation; random ones while there is no parent."""
        n = context.batch_size
        if len(_complete(study)) < self.settings.population:
            return stratified(context, n, generator), 0
        trials = [study.ask() for _ in range(n)]
        widths = context.space.gene_widths
        genomes = [
            tuple(
                trial.suggest_int(f"gene{i}", 0, len(legal) - 1) if len(legal) > 1 else 0
                for i, legal in enumerate(widths)
            )
            for trial in trials
        ]
        asked = study.get_trials(deepcopy=False)[trials[0].number]
        generation = int(asked.system_attrs.get(_generation_key(study), 0))
        for trial in trials:
            study.tell(trial, state=_failed())  # the repaired genes are told instead
        return genomes, generation

    def _tell(
        self,
        study: optuna.Study,
        context: Context,
        genome: Sequence[int],
        evaluation: Evaluation,
        generation: int,
    ) -> None:
        import optuna

        genes = {
            f"gene{i}": (int(at), len(legal) - 1)
            for i, (at, legal) in enumerate(zip(genome, context.space.gene_widths, strict=True))
            if len(legal) > 1
        }
        loss = evaluation.loss if np.isfinite(evaluation.loss) else WORST
        study.add_trial(
            optuna.trial.create_trial(
                values=[
                    float(np.log10(np.clip(loss, LEAST, WORST))),
                    np.log2(evaluation.size_bytes),
                ],
                params={name: at for name, (at, _) in genes.items()},
                distributions={
                    name: optuna.distributions.IntDistribution(0, widest)
                    for name, (_, widest) in genes.items()
                },
                constraints=excess(context.budgets, evaluation.costs),
                system_attrs={_generation_key(study): generation},
            )
        )


class NSGA2(OptunaSampler):
    """Non-dominated sorting with crowding distance [Deb2002], constrained domination."""

    name = "nsga2"
    traits = Traits("NSGA-II on widths, under constraints", granularity=GRANULARITY)

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(population_size=self.settings.population, seed=seed)


class NSGA3(OptunaSampler):
    """Reference directions instead of crowding distance [Deb2014]."""

    name = "nsga3"
    traits = Traits("NSGA-III on widths, under constraints", granularity=GRANULARITY)

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        with warnings.catch_warnings():  # the class is marked experimental; versions are bounded
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.NSGAIIISampler(
                population_size=self.settings.population,
                dividing_parameter=self.settings.population - 1,
                seed=seed,
            )


class TPE(OptunaSampler):
    """Multi-objective tree-structured Parzen estimator [Ozaki2022], joint over all genes."""

    name = "tpe"
    traits = Traits(
        "multivariate TPE on widths, under constraints",
        granularity=GRANULARITY,
        cost_per_trial="O(trials x genes)",
    )

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.TPESampler(
            multivariate=True, n_startup_trials=0, constant_liar=True, seed=seed
        )


def _complete(study: optuna.Study) -> list[Any]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _generation_key(study: optuna.Study) -> str:
    """Where a genetic sampler looks for the generation of a trial."""
    key = getattr(study.sampler, "_get_generation_key", None)
    return "generation" if key is None else str(key())
