"""Two steps: first prune, then quantize what is left. The pipeline that AJPQ is compared with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.agent import AgentStrategy
from agents.campaign import Campaign, Goal
from agents.controllers import seeded
from agents.pilot import Pilot, Scope
from agents.policy_store import save_policy
from agents.problem import Problem
from agents.wall import Wall
from search.evaluation import Evaluation
from search.strategy import Context, Traits

WIDEST = 8.0  # bits at which the first step judges
UNLIMITED = 160  # evaluations that are taken for the whole where nothing but time limits the run


class TwoStep(AgentStrategy):
    """AMC for half of the evaluations, then HAQ on the channels it left [Tang2020].

    The first step judges channels at the widest width and may take as many bytes as the second
    step is expected to save: its trials may lie over the run's budget, those of the second never
    do.
    """

    name = "two-step"
    traits = Traits(
        "prunes first, then quantizes: AMC and HAQ, half of the evaluations each",
        granularity=("group", "channel"),
        activations=False,
        budget_aware=False,
        cost_per_trial="O(steps) gradient steps per batch",
    )
    scope = Scope(widths=False, by_channel=False)

    @dataclass(frozen=True, slots=True)
    class Settings(AgentStrategy.Settings):
        """See `AgentSettings`.

        Attributes:
            bits: mean width that the second step is expected to end at.
        """

        bits: float = 4.0

    settings: Settings

    def run(self, context: Context) -> None:
        problem = Problem.of(
            context, self.settings.importance, self.settings.groups, tilt=self.settings.tilt
        )
        self.keep_ranking(context, problem)
        left = context.remaining().trials
        half = (UNLIMITED if left is None else left) // 2
        factor = WIDEST / self.settings.bits
        names = problem.structure.costs if problem.structure is not None else ()
        structural = {name: context.budgets[name] for name in names}
        pruner = self.pilot(context, self.scope)
        try:
            first = Campaign(
                context, problem, pruner, Wall(problem, "channels"), self.settings,
                goal_of=lambda b: Goal(b * factor, {**structural, "size_bytes": b * factor}),
            )  # fmt: skip
            first.run(self.name, half)
        finally:
            save_policy(pruner, context.folder("agents") / f"{self.name}-policy", self.name)
        pruned = [e for e in first.evaluations if e.strategy in (self.name, "")]
        self._quantize(context, problem, pruned)

    def _quantize(self, context: Context, problem: Problem, pruned: list[Evaluation]) -> None:
        factor = WIDEST / self.settings.bits

        def goal_of(budget_bytes: float) -> Goal:
            limits = dict(context.budgets)
            limits["size_bytes"] = min(budget_bytes, limits.get("size_bytes", budget_bytes))
            return Goal(budget_bytes, limits, _mask(problem, pruned, budget_bytes * factor))

        with seeded(context.seed, 1, self.name, "make"):
            pilot = Pilot(
                Scope(prune=False, by_channel=False), self.settings.algorithm, self.settings.hidden
            )
        walls = Wall(problem, "layers")
        Campaign(context, problem, pilot, walls, self.settings, goal_of=goal_of).run(
            f"{self.name}-quantize"
        )


def _mask(
    problem: Problem, pruned: list[Evaluation], size_bytes: float
) -> NDArray[np.bool_] | None:
    """Genes that the best pruned network of at most that size is without."""
    fitting = [e for e in pruned if e.size_bytes <= size_bytes]
    if not fitting:
        return None
    best = min(fitting, key=lambda e: e.loss)
    genome = np.array(problem.space.encode(best.candidate), np.intp)
    lowest = np.array([widths[0] for widths in problem.space.gene_widths])
    mask: NDArray[np.bool_] = (genome == 0) & (lowest == 0)
    return mask
