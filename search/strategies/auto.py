"""The default: baselines, then the rate-distortion front, then samplers where it is weakest."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from cost_models.base import CostModel
from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError
from quant_ops.quantized import QuantizedModel
from search.evaluation import Evaluation
from search.space import SearchSpace
from search.strategies.table import make_strategy
from search.strategy import ChannelFacts, ChannelLosses, Context, Remaining, Strategy, Traits
from search.training.trainable import Trainable

OPENING = ("uniform", "rate-distortion")  # each runs to its end
BY_CHANNEL = ("channel-allocation",)  # then these, where channels have widths of their own
AGENT, AGENT_BATCHES, AGENT_SECONDS = "ajpq", 4, 300.0  # joins the rounds of long runs
ROUNDS = (("local-search", 2), ("nsga2", 1))  # strategy, batches; repeated until time is used up


class Auto(Strategy):
    """A table of strategies and shares.

    Every strategy of a round starts from all that was measured before, so that samplers are
    seeded with the front. Ends early when a whole round finds nothing new to try.
    """

    name = "auto"
    traits = Traits(
        "uniform, rate-distortion, then local search, NSGA-II and, in long runs, AJPQ in turn",
        granularity=("layer", "group", "channel"),
    )

    @dataclass(frozen=True, slots=True)
    class Settings:
        """Settings.

        Attributes:
            points: sizes at which the integer program is solved.
            pairs: as of rate-distortion.
        """

        points: int = 24
        pairs: bool = False

    settings: Settings

    def run(self, context: Context) -> None:
        memory = Memory()
        by_channel = any(choice.groups for choice in context.space.layers)
        for name in OPENING + BY_CHANNEL * by_channel:
            settings = asdict(self.settings) if name == "rate-distortion" else {}
            make_strategy(name, settings).run(Share(context, memory, context.seed, name))
        rounds = _rounds(context)
        number = 0
        while not context.should_stop():
            before = len(memory.results)
            for name, batches in rounds:
                seed = int(np.random.SeedSequence([context.seed, number]).generate_state(1)[0])
                share = Share(context, memory, seed, name, batches)
                make_strategy(name).run(share)
                number += 1
            if len(memory.results) == before:
                return


def _rounds(context: Context) -> tuple[tuple[str, int], ...]:
    """An agent learns slowly: it has a share where minutes are left and something can be pruned."""
    seconds = context.remaining().seconds
    if seconds is None or seconds < AGENT_SECONDS:
        return ROUNDS
    try:
        make_strategy(AGENT).check(context.space)
    except UsageError:
        return ROUNDS
    return (*ROUNDS, (AGENT, AGENT_BATCHES))


@dataclass
class Memory:
    """What all shares of one run have in common."""

    results: dict[Candidate, Evaluation] = field(default_factory=dict)
    costs: dict[Candidate, dict[str, float]] = field(default_factory=dict)


class Share:
    """A Context that ends after some batches and remembers what it was answered.

    Its history is what this run of `auto` was told so far: on a resumed run the record may hold
    more than that, and proposals must not depend on it.
    """

    def __init__(
        self,
        context: Context,
        memory: Memory,
        seed: int,
        strategy: str,
        batches: int | None = None,
    ) -> None:
        self._context = context
        self._memory = memory
        self._left = batches
        self.seed = seed
        self.space: SearchSpace = context.space
        self.budgets: Mapping[str, float] = context.budgets
        self.sizes: tuple[int, ...] = context.sizes
        self.costs: Mapping[str, CostModel] = context.costs
        self.batch_size = context.batch_size
        self.strategy = context.strategy = strategy

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        evaluations = self._context.evaluate(candidates)
        for evaluation in evaluations:
            self._memory.results[evaluation.candidate] = evaluation
        if self._left is not None:
            self._left -= 1
        return evaluations

    def probe(self, changes: Sequence[Mapping[str, float]]) -> list[float]:
        return self._context.probe(changes)

    def channel_losses(self) -> ChannelLosses:
        return self._context.channel_losses()

    def channel_facts(self) -> Mapping[str, ChannelFacts]:
        return self._context.channel_facts()

    def size_of(self, candidate: Candidate) -> int:
        return self._context.size_of(candidate)

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        if candidate not in self._memory.costs:
            self._memory.costs[candidate] = self._context.cost_of(candidate)
        return dict(self._memory.costs[candidate])

    def submit(
        self, candidate: Candidate, model: QuantizedModel, *, recipe: str, parent: int | None = None
    ) -> Evaluation:
        return self._context.submit(candidate, model, recipe=recipe, parent=parent)

    def training(self) -> Trainable:
        return self._context.training()

    def history(self) -> list[Evaluation]:
        return list(self._memory.results.values())

    def should_stop(self) -> bool:
        return self._left == 0 or self._context.should_stop()

    def remaining(self) -> Remaining:
        return self._context.remaining()

    def report(self, text: str) -> None:
        self._context.report(text)

    def folder(self, name: str) -> Path:
        return self._context.folder(name)
