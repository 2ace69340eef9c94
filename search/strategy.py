"""The contract between a search method and the engine."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cost_models.base import CostModel
from quant_ops.candidate import Candidate
from quant_ops.quantized import QuantizedModel
from search.evaluation import Evaluation
from search.space import SearchSpace

if TYPE_CHECKING:
    from search.training.trainable import Trainable

ChannelLosses: TypeAlias = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelFacts:
    """What a layer's output channels are ranked by.

    Attributes:
        weights: (out_channels, weights of one channel) of the float network, norms folded in.
        gamma: (out_channels,) scale of the batch norm that was folded in; ones where none was.
        taylor: (out_channels,) predicted loss without the channel: half the mean square of the
            first-order term, sum of value x gradient.
        trace: (out_channels,) mean squared gradient, summed over the channel's weights.
    """

    weights: NDArray[np.float64]
    gamma: NDArray[np.float64]
    taylor: NDArray[np.float64]
    trace: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a strategy's share; None is no limit."""

    trials: int | None = None
    seconds: float | None = None


class Context(Protocol):
    """What the engine offers a strategy.

    Attributes:
        space: what may be chosen.
        budgets: cost-model name to inclusive limit; the loosest one per cost.
        sizes: every size asked for, in bytes, ascending: each wants a good candidate of its own.
        costs: cost-model name to model, for costs that need no evaluation.
        seed: all randomness of a strategy derives from it and the batch number.
        batch_size: how many candidates a batch should hold to keep the workers busy.
        strategy: name under which evaluations are recorded; a strategy that is made of others
            sets it to theirs.
    """

    space: SearchSpace
    budgets: Mapping[str, float]
    sizes: tuple[int, ...]
    costs: Mapping[str, CostModel]
    seed: int
    batch_size: int
    strategy: str

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """Evaluate in parallel, record, answer in proposal order; known ones are not run again.

        Raises `SearchOver` (not to be caught) when the trials or the time are used up.
        """

    def probe(self, changes: Sequence[Mapping[str, float]]) -> list[float]:
        """Quality loss on the probe subset with only the named layers quantized, rest float.

        Answers are kept in the run's folder, so that a table is measured once. Not trials; their
        cost is counted in forward passes.
        """

    def channel_losses(self) -> ChannelLosses:
        """Per layer with a choice: predicted loss (out_channels, widths), weights' spread.

        Predicted from gradients on the probe subset, each channel alone at each legal width;
        the spread is the standard deviation of a channel's weights, (out_channels,).
        """

    def channel_facts(self) -> Mapping[str, ChannelFacts]:
        """Per searchable layer what its channels can be ranked by; measured on the probe subset."""

    def size_of(self, candidate: Candidate) -> int:
        """Exact length of the packed file."""

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        """Every cost that a budget names, plus size_bytes."""

    def submit(
        self, candidate: Candidate, model: QuantizedModel, *, recipe: str, parent: int | None = None
    ) -> Evaluation:
        """Record a candidate that brings trained or recovered weights of its own."""

    def training(self) -> "Trainable":
        """The task's training data and network, for strategies whose traits say `needs_training`.

        Raises:
            UsageError: the task has no training data.
        """

    def history(self) -> list[Evaluation]:
        """Every finished evaluation of the run, all strategies, in order of trial."""

    def should_stop(self) -> bool:
        """Whether the trials or the time of this strategy are used up."""

    def remaining(self) -> Remaining:
        """Trials and seconds that are left of this strategy's share."""

    def report(self, text: str) -> None:
        """A few words on the state of the strategy, shown beside the progress."""

    def folder(self, name: str) -> Path:
        """A folder for checkpoints, made if need be."""


class SearchOver(Exception):
    """The strategy's share of trials or time is used up; what is finished is recorded."""


@dataclass(frozen=True, slots=True)
class Traits:
    """One row of the capability table."""

    summary: str
    granularity: tuple[str, ...] = ("layer",)
    activations: bool = True
    budget_aware: bool = True
    deterministic: bool = True
    needs_training: bool = False
    parallel: bool = True
    cost_per_trial: str = "O(1)"


class Strategy(ABC):
    """One search method: one file, one class, one row in `search.strategies.table`.

    Settings are the fields of `Settings`, a frozen dataclass nested in the strategy, reachable as
    `--set NAME.KEY=VALUE`. Proposals are a pure function of (seed, batch number, ordered results
    of earlier batches): derive a generator per batch with `batch_generator`, never carry one.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits]

    @dataclass(frozen=True, slots=True)
    class Settings:
        """No settings."""

    def __init__(self, settings: object | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    def check(self, space: SearchSpace) -> None:  # noqa: B027, most strategies take any space
        """Refuse a space, or settings, with which the strategy has nothing to do.

        Asked before anything is measured.

        Raises:
            UsageError: says what is missing and what to do.
        """

    @abstractmethod
    def run(self, context: Context) -> None:
        """Propose through `context.evaluate` until `context.should_stop()` or nothing is left."""


def batch_generator(seed: int, batch: int, stream: str = "") -> np.random.Generator:
    """The generator of one batch; `stream` keeps strategies of one run apart."""
    return np.random.default_rng([seed, batch, crc32(stream.encode())])
