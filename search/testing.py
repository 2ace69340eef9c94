"""Shared test code: a task whose answer is a formula, and what every strategy has to do on it."""

import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray

from cost_models.base import CostModel
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph, Layer
from quant_ops.quantized import QuantizedModel
from search.evaluation import Evaluation, within
from search.space import EdgeChoice, LayerChoice, SearchSpace
from search.strategies.table import make_strategy, strategy_class
from search.strategies.uniform import uniform_candidates
from search.strategy import ChannelFacts, ChannelLosses, Remaining, SearchOver, Strategy
from search.training.trainable import Trainable

HEADER_BYTES = 100
WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class AdditiveTask:
    """A space with loss = sum_layers s * mean_channels 4^-b + sum_edges e * 4^-a.

    Size is 100 bytes, plus per layer ceil(weights * mean width / 8), times 3/4 where the layer
    before it is removed: removal couples neighbours as it does in real files.
    """

    space: SearchSpace
    sensitivity: Mapping[str, float]

    @classmethod
    def make(
        cls,
        n_layers: int = 8,
        *,
        widths: Sequence[float] = WIDTHS,
        pins: Mapping[int, float] | None = None,
        removable: Iterable[int] = (),
        n_groups: int = 0,
        n_edges: int = 0,
        seed: int = 0,
    ) -> "AdditiveTask":
        """Layers "layer0".. of 8 channels with random sizes and sensitivities."""
        rng = np.random.default_rng(seed)
        layers, choices = [], []
        for i in range(n_layers):
            legal = tuple(widths)
            if i in set(removable):
                legal = (0.0, *legal)
            if pins and i in pins:
                legal = (pins[i],)
            name, per_channel = f"layer{i}", int(2 ** rng.uniform(3, 9))
            layers.append(_layer(name, i, per_channel))
            channels = np.array_split(np.arange(8), n_groups) if n_groups else []
            groups = tuple(tuple(int(c) for c in part) for part in channels)
            choices.append(LayerChoice(name, legal, groups))
        edges = tuple(EdgeChoice(f"edge{i}", (2, 4, 8)) for i in range(n_edges))
        names = [choice.name for choice in choices] + [edge.name for edge in edges]
        sensitivity = {name: float(10 ** rng.uniform(-1, 1)) for name in names}
        return cls(SearchSpace(Graph((), (), tuple(layers)), tuple(choices), edges), sensitivity)

    def loss(self, candidate: Candidate) -> float:
        """The formula."""
        total = 0.0
        for name, quant in candidate.layers:
            per_channel = np.array(quant.per_channel(8))
            total += self.sensitivity[name] * float(np.mean(4.0**-per_channel))
        return total + sum(self.sensitivity[name] * 4.0**-b for name, b in candidate.activations)

    def size_bytes(self, candidate: Candidate) -> int:
        """The formula."""
        total, before = HEADER_BYTES, 1.0
        for name, quant in candidate.layers:
            mean_width = float(np.mean(quant.per_channel(8)))
            n_bits = self.space.graph.layer_of[name].n_weights * mean_width
            total += int(np.ceil(n_bits / 8 * (1.0 if before else 0.75)))
            before = mean_width
        return total

    def bops(self, candidate: Candidate) -> float:
        """MACs x weight width x width of the layer's activation (32 where there is none)."""
        activation = dict(candidate.activations)
        return sum(
            self.space.graph.layer_of[name].macs
            * float(np.mean(quant.per_channel(8)))
            * activation.get(f"edge{i}", 32)
            for i, (name, quant) in enumerate(candidate.layers)
        )


def _layer(name: str, site: int, per_channel: int) -> Layer:
    shape = (8, per_channel)
    return Layer(name, "linear", f"{name}.weight", None, (site,), shape, 8, 1, macs=8 * per_channel)


@dataclass(eq=False)
class FakeContext:
    """An engine in memory that evaluates formulas.

    A run that is resumed starts with a `record`: its candidates are answered from there, they
    count as trials when they are asked for, and `history` holds only what was answered so far.

    Attributes:
        trials: how many distinct candidates may be evaluated.
        record: every finished evaluation, of interrupted runs too.
        batches: the candidates of every call.
    """

    task: AdditiveTask
    budgets: Mapping[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    seed: int = 0
    trials: int = 40
    batch_size: int = 4
    strategy: str = ""
    record: list[Evaluation] = field(default_factory=list)
    costs: Mapping[str, CostModel] = field(default_factory=dict)
    batches: list[list[Candidate]] = field(default_factory=list)
    answered: dict[Candidate, Evaluation] = field(default_factory=dict)
    n_probes: int = 0
    reports: list[str] = field(default_factory=list)
    path: Path | None = None
    seconds: float | None = None
    space: SearchSpace = field(init=False)

    def __post_init__(self) -> None:
        self.space = self.task.space

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """One by one; the trials may run out in the middle of a batch."""
        self.batches.append(list(candidates))
        recorded = {evaluation.candidate: evaluation for evaluation in self.record}
        for candidate in candidates:
            if candidate in self.answered:
                continue
            if len(self.answered) == self.trials:
                raise SearchOver
            if candidate not in recorded:
                self.record.append(self._evaluate(candidate))
                recorded[candidate] = self.record[-1]
            self.answered[candidate] = recorded[candidate]
        return [self.answered[candidate] for candidate in candidates]

    def _evaluate(self, candidate: Candidate) -> Evaluation:
        loss, trial = self.task.loss(candidate), len(self.record)
        return Evaluation(candidate, loss, None, self.cost_of(candidate), trial=trial)

    def probe(self, changes: Sequence[Mapping[str, float]]) -> list[float]:
        """The formula with only the named layers and edges quantized."""
        self.n_probes += len(changes)
        s = self.task.sensitivity
        return [
            sum(s[name.removeprefix("edge:")] * 4.0**-width for name, width in change.items())
            for change in changes
        ]

    def channel_losses(self) -> ChannelLosses:
        """The formula, shared unevenly by the channels: as a prediction would have it."""
        out = {}
        for choice in self.space.layers:
            law: NDArray[np.float64] = 4.0 ** -np.array(choice.bit_widths, dtype=np.float64)
            shares: NDArray[np.float64] = 4.0 ** np.arange(8, dtype=np.float64)
            losses = np.outer(shares / shares.sum(), self.task.sensitivity[choice.name] * law)
            out[choice.name] = (losses.astype(np.float64), shares)
        return out

    def channel_facts(self) -> Mapping[str, ChannelFacts]:
        """Ranked like the shares of `channel_losses`, by every criterion."""
        facts = {}
        for choice in self.space.layers:
            layer = self.space.graph.layer_of[choice.name]
            shares: NDArray[np.float64] = 2.0 ** np.arange(8, dtype=np.float64)
            weights = np.outer(shares, np.linspace(-1, 1, layer.weights_per_channel))
            facts[choice.name] = ChannelFacts(weights, shares, shares**2, shares)
        return facts

    def size_of(self, candidate: Candidate) -> int:
        """The formula."""
        return self.task.size_bytes(candidate)

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        """Size and BOPs."""
        return {
            "size_bytes": float(self.task.size_bytes(candidate)),
            "bops": self.task.bops(candidate),
        }

    def submit(
        self, candidate: Candidate, model: QuantizedModel, *, recipe: str, parent: int | None = None
    ) -> Evaluation:
        """Weights make no difference to a formula: the candidate's own evaluation."""
        evaluation = self._evaluate(candidate)
        self.record.append(evaluation)
        return evaluation

    def training(self) -> Trainable:
        """A formula has nothing to train."""
        raise NotImplementedError

    def history(self) -> list[Evaluation]:
        """What this run was answered so far, in order."""
        return list(self.answered.values())

    def should_stop(self) -> bool:
        """Whether the trials are used up."""
        return len(self.answered) >= self.trials

    def remaining(self) -> Remaining:
        """The trials that are left, and what was said of the time."""
        return Remaining(self.trials - len(self.answered), self.seconds)

    def report(self, text: str) -> None:
        """Kept."""
        self.reports.append(text)

    def folder(self, name: str) -> Path:
        """Inside a temporary folder that goes with the context."""
        if self.path is None:
            self.path = Path(mkdtemp())
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        (self.path / name).mkdir(exist_ok=True)
        return self.path / name


def run_to_end(strategy: Strategy, context: FakeContext) -> list[Evaluation]:
    """Run as the engine does, and give the record."""
    with suppress(SearchOver):
        strategy.run(context)
    return context.record


def mid_budget(task: AdditiveTask) -> float:
    """The size of uniform 4 bit."""
    return float(task.size_bytes(task.space.uniform(4)))


class StrategyContract:
    """What every row of the table does; subclass it, set `name` (and cheap `settings`)."""

    name: str
    settings: Mapping[str, object] = {}
    needs: Mapping[str, object] = {}  # what the strategy needs of its tasks

    def make_task(self, **options: object) -> AdditiveTask:
        """A task; what a test asks for goes before what the strategy needs."""
        return AdditiveTask.make(**{**self.needs, **options})  # type: ignore[arg-type]

    def make(self) -> Strategy:
        """A new strategy."""
        return make_strategy(self.name, self.settings)

    def run(self, task: AdditiveTask, **kwargs: object) -> list[Evaluation]:
        """A run at the size of uniform 4 bit."""
        budgets = {"size_bytes": mid_budget(task)}
        context = FakeContext(task, **{"budgets": budgets, **kwargs})  # type: ignore[arg-type]
        return run_to_end(self.make(), context)

    def test_name_is_the_one_in_the_table(self) -> None:
        assert strategy_class(self.name).name == self.name

    def test_stays_in_the_space(self) -> None:
        task = self.make_task()
        record = self.run(task)
        assert record
        assert all(task.space.contains(e.candidate) for e in record)

    def test_pins_and_removable_layers_are_honoured(self) -> None:
        task = self.make_task(pins={0: 8.0, 7: 5.0}, removable=(2, 3))
        record = self.run(task)
        assert record
        for evaluation in record:
            assert task.space.contains(evaluation.candidate)
            assignment = evaluation.candidate.assignment
            assert (assignment["layer0"].uniform, assignment["layer7"].uniform) == (8.0, 5.0)

    def test_a_space_of_channel_groups_is_searched(self) -> None:
        task = self.make_task(n_layers=4, n_groups=4)
        record = self.run(task)
        assert record
        assert all(task.space.contains(e.candidate) for e in record)
        if "group" in strategy_class(self.name).traits.granularity:
            assert any(q.uniform is None for e in record for _, q in e.candidate.layers)

    def test_activation_widths_are_searched(self) -> None:
        if not strategy_class(self.name).traits.activations:
            return
        task = self.make_task(n_layers=4, n_edges=4)
        bops = task.bops(task.space.largest())
        record = self.run(task, budgets={"bops": bops / 4}, trials=30)
        assert all(task.space.contains(e.candidate) for e in record)
        assert len({e.candidate.activations for e in record}) > 1

    def test_trials_are_not_exceeded(self) -> None:
        assert len(self.run(self.make_task(), trials=5)) == 5

    def test_a_space_of_one_candidate_comes_to_an_end(self) -> None:
        task = self.make_task(n_layers=2, widths=(4.0,))
        assert len(self.run(task)) <= 1

    def test_no_candidate_is_wasted_on_a_repetition(self) -> None:
        task = self.make_task()
        context = FakeContext(task, {"size_bytes": mid_budget(task)})
        run_to_end(self.make(), context)
        proposed = sum(len(batch) for batch in context.batches)
        assert proposed - len(context.answered) <= 0.1 * proposed + context.batch_size

    def test_repeats_under_one_seed(self) -> None:
        if not strategy_class(self.name).traits.deterministic:
            return
        first, second = (self.run(self.make_task(), seed=3) for _ in range(2))
        assert [e.candidate for e in first] == [e.candidate for e in second]

    def test_a_resumed_run_ends_like_an_uninterrupted_one(self) -> None:
        if not strategy_class(self.name).traits.deterministic:
            return
        whole = self.run(self.make_task(), seed=1)
        for cut in {0, 1, 7, len(whole) // 2, len(whole)}:
            resumed = self.run(self.make_task(), seed=1, record=whole[:cut])
            assert [e.candidate for e in resumed] == [e.candidate for e in whole]

    def test_what_is_over_the_budget_is_not_proposed(self) -> None:
        if not strategy_class(self.name).traits.budget_aware:
            return
        task = self.make_task(removable=(2, 3))
        budgets = {"size_bytes": mid_budget(task), "bops": task.bops(task.space.uniform(5))}
        record = self.run(task, budgets=budgets)
        baselines = set(uniform_candidates(task.space))
        chosen = [e for e in record if e.candidate not in baselines]
        assert chosen
        assert all(within(budgets, e.costs) for e in chosen)
