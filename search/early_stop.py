"""Gives up a candidate once it is certain that a known one of at most its cost is better.

Losses come sample by sample and in one order, so a candidate is compared with its incumbent on the
same samples. The test holds at all numbers of samples together: looking often costs nothing.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.evaluation import Evaluation

ERROR = 1e-3  # probability that a candidate no worse than its incumbent is ever given up
FIRST_LOOK = 256  # samples; an estimate of fewer is too rough to learn from
MARGIN = 0.05  # share of the incumbent's loss by which a candidate has to be worse: no near-ties
BOLDEST = 0.75  # share of the wealth that a bet may lose
CLIPPED = 0.95  # quantile of the incumbent's losses above which they are not compared
STEP = 1.05  # factor between levels that are tried as bound
ROUNDING = 1e-6  # a divergence of equal outputs can come out below 0 by so much
MEMORY_BYTES = 64 << 20


def evidence(
    losses: NDArray[np.float64], known: NDArray[np.float64], level: float
) -> NDArray[np.float64]:
    """(n,): log wealth, after each sample, of bets that the mean loss is above `level`.

    A capital process for sampling without replacement [WaudbySmith2024]: bets on
    z = loss - min(known loss, b), whose mean over the split is at most m = level - mean(min(known
    loss, b)) if the mean loss is not above `level`. Given the past, the mean of the next z is
    then at most rest = (N m - sum of the z so far) / (samples left), so that the product of
    1 + bet (z - rest) has falling expectation; it stays positive as z >= -b. By Ville's inequality
    it ever reaches 1 / error with probability at most `error`. Nothing is assumed of the losses
    but that they are not negative and come in random order. Bets are Kelly's by past moments
    (aGRAPA there). Departure: what the known candidate loses on the whole split is known, so its
    largest losses are clipped at b; they would make every bet timid.

    Args:
        losses: (n,), the first ones.
        known: (N,), N > n, of the incumbent.
        level: a mean loss.
    """
    n, n_all = len(losses), len(known)
    b = float(np.quantile(known, CLIPPED))
    clipped = np.minimum(known, b)
    z = losses - clipped[:n]
    m = level - float(clipped.mean())
    seen = np.arange(n)
    total = np.cumsum(z) - z
    rest = (n_all * m - total) / (n_all - seen)
    mean = (m + total) / (seen + 1)
    square = (level**2 + m**2 + np.cumsum(z**2) - z**2) / (seen + 1)
    edge = mean - rest
    room = b + rest
    slack = 1e-9 * (b + level)
    impossible = np.logical_or.accumulate(room < -slack)  # even losses of 0 from here are too much
    playing = room > slack
    boldest = BOLDEST / np.where(playing, room, 1.0)
    bet = np.clip(edge / (np.maximum(square - mean**2, 0.0) + edge**2 + 1e-300), 0.0, boldest)
    gains = np.log1p(np.where(playing, bet * (z - rest), 0.0))
    return np.where(impossible, np.inf, np.cumsum(gains))


@dataclass(frozen=True, slots=True)
class Stop:
    """Where an evaluation was given up.

    Attributes:
        bound: the loss is above this (confidence 1 - `ERROR`).
        estimate: the incumbent's loss plus the mean difference so far.
        n_samples: that were looked at.
    """

    bound: float
    estimate: float
    n_samples: int


@dataclass(frozen=True, slots=True, eq=False)
class Incumbent:
    """A known candidate that another one has to beat.

    Attributes:
        loss: its mean over all samples.
        losses: (samples,) in the order of the split.
    """

    loss: float
    losses: NDArray[np.float32]

    def verdict(self, losses: NDArray[np.float64]) -> Stop | None:
        """Whether a candidate with these first losses is given up, and at which bound.

        A loss that is not finite makes the mean infinite whatever follows. Where losses can be
        negative nothing is given up.
        """
        n = len(losses)
        if n < FIRST_LOOK or n >= len(self.losses):
            return None
        if not np.isfinite(losses).all():
            return Stop(math.inf, math.inf, n)
        known = self.losses.astype(np.float64)
        if min(losses.min(), known.min()) < -ROUNDING:
            return None
        losses, known = np.maximum(losses, 0.0), np.maximum(known, 0.0)
        bound = 0.0
        level = self.loss * (1 + MARGIN)
        # the first level that is not above the mean stops a wrong bound from rising, so that all
        # levels together err no more often than one
        while float(evidence(losses, known, level).max()) >= -math.log(ERROR):
            bound, level = level, level * STEP
        if not bound:
            return None
        estimate = self.loss + float((losses - known[:n]).mean())
        return Stop(bound, max(bound, estimate), n)


class Incumbents:
    """What nothing known beats in loss and in every cost that counts, with losses per sample.

    Args:
        names: of the costs that count.
        memory_bytes: what the losses may fill; the oldest are dropped.
    """

    def __init__(self, names: Iterable[str], *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._names = tuple(names)
        self._memory_bytes = memory_bytes
        self._known: list[Evaluation] = []
        self._losses: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    def add(self, evaluation: Evaluation, losses: NDArray[np.float32] | None = None) -> None:
        """A finished evaluation; one that was stopped or has weights of its own is ignored."""
        if evaluation.pruned or evaluation.recipe or not math.isfinite(evaluation.loss):
            return
        if any(self._beats(known, evaluation) for known in self._known):
            return
        kept = [known for known in self._known if not self._beats(evaluation, known)]
        for trial in {e.trial for e in self._known} - {e.trial for e in kept}:
            self._losses.pop(trial, None)
        self._known = [*kept, evaluation]
        if losses is not None:
            self.remember(evaluation, losses)

    def best(self, costs: Mapping[str, float]) -> Evaluation | None:
        """The one of least loss that costs no more in any respect."""
        inside = [e for e in self._known if all(e.costs[n] <= costs[n] for n in self._names)]
        return min(inside, key=lambda e: (e.loss, e.trial), default=None)

    def losses(self, evaluation: Evaluation) -> NDArray[np.float32] | None:
        """(samples,), or None where they are not known (any more)."""
        return self._losses.get(evaluation.trial)

    def remember(self, evaluation: Evaluation, losses: NDArray[np.float32]) -> None:
        """Keep the losses per sample of one of these."""
        self._losses[evaluation.trial] = losses
        while sum(kept.nbytes for kept in self._losses.values()) > self._memory_bytes:
            self._losses.popitem(last=False)

    def _beats(self, a: Evaluation, b: Evaluation) -> bool:
        return a.loss <= b.loss and all(a.costs[n] <= b.costs[n] for n in self._names)
