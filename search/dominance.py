"""Which evaluations dominate which, and how much a front is worth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

from search.evaluation import Evaluation

REFERENCE_POINT = (1.0, 1.0)


def non_dominated(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other matches or beats in both loss and size_bytes, sorted by size_bytes.

    Of equals the first is kept. Pruned evaluations and non-finite losses never enter.
    """
    complete = [e for e in evaluations if is_complete(e)]
    if not complete:
        return []
    points = np.array([(e.loss, e.size_bytes) for e in complete], dtype=float)
    keep = moocore.is_nondominated(points)
    return sorted(
        (e for e, kept in zip(complete, keep, strict=True) if kept), key=lambda e: e.size_bytes
    )


def is_complete(evaluation: Evaluation) -> bool:
    """Whether it can enter a front: not stopped early, outputs finite."""
    return not evaluation.pruned and bool(np.isfinite(evaluation.loss))


@dataclass(frozen=True, slots=True)
class HypervolumeScale:
    """What turns (loss, size_bytes) into the unit square, the same for every front of a task.

    x = log2(bytes) from `smallest_bytes` to `largest_bytes`, y = loss from 0 (float) to
    `worst_loss`; both clipped below at 0. Points at or beyond 1 enclose nothing.

    Attributes:
        smallest_bytes: the smallest legal file.
        largest_bytes: the file with every layer at 8 bits.
        worst_loss: quality loss of a useless model.
    """

    smallest_bytes: int
    largest_bytes: int
    worst_loss: float

    def __post_init__(self) -> None:
        if not 0 < self.smallest_bytes < self.largest_bytes:
            raise ValueError(f"no size range: {self.smallest_bytes} to {self.largest_bytes} bytes")
        if not 0 < self.worst_loss < float("inf"):
            raise ValueError(f"worst_loss must be positive and finite, got {self.worst_loss}")

    def project(self, evaluations: Iterable[Evaluation]) -> NDArray[np.float64]:
        """(x, y) per evaluation, shape (n, 2)."""
        raw = np.array([(e.size_bytes, e.loss) for e in evaluations], dtype=float).reshape(-1, 2)
        low, high = np.log2([self.smallest_bytes, self.largest_bytes])
        x = (np.log2(raw[:, 0]) - low) / (high - low)
        y = raw[:, 1] / self.worst_loss
        points: NDArray[np.float64] = np.maximum(np.column_stack([x, y]), 0.0)
        return points

    def hypervolume(self, evaluations: Iterable[Evaluation]) -> float:
        """Share of the unit square that the complete, finite evaluations dominate."""
        points = self.project(e for e in evaluations if is_complete(e))
        points = points[(points < REFERENCE_POINT).all(axis=1)]
        if not len(points):
            return 0.0
        return float(moocore.hypervolume(points, ref=REFERENCE_POINT))

    def share_of_gap(
        self,
        evaluations: Iterable[Evaluation],
        *,
        baseline: Iterable[Evaluation],
        union: Iterable[Evaluation],
    ) -> float | None:
        """Share of the area between a baseline's front and the union of all known fronts.

        0 is the baseline, 1 the union; None where there is no area between them.
        """
        floor, ceiling = self.hypervolume(baseline), self.hypervolume(union)
        if ceiling <= floor:
            return None
        return (self.hypervolume(evaluations) - floor) / (ceiling - floor)
