"""Which evaluations form the front, and where it is weakest."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import moocore
import numpy as np
from numpy.typing import NDArray

from search.evaluation import Evaluation, within


def non_dominated_ranks(points: NDArray[np.float64]) -> NDArray[np.intp]:
    """0 for the front of (n, objectives) points, 1 for the front of the rest, and so on."""
    if not len(points):
        return np.zeros(0, dtype=np.intp)
    return np.asarray(moocore.pareto_rank(points), dtype=np.intp)


def front_of(evaluations: Iterable[Evaluation], budgets: Mapping[str, float]) -> list[Evaluation]:
    """Non-dominated in (size, loss) inside every budget, smallest first; plain candidates only."""
    usable = [
        e
        for e in evaluations
        if np.isfinite(e.loss) and not e.pruned and not e.recipe and within(budgets, e.costs)
    ]
    front: list[Evaluation] = []
    for evaluation in sorted(usable, key=lambda e: (e.size_bytes, e.loss)):
        if not front or evaluation.loss < front[-1].loss:
            front.append(evaluation)
    return front


def gaps(front: Sequence[Evaluation]) -> list[tuple[float, int]]:
    """(area, position) of the rectangle between each point and its next larger one, largest first.

    The area in log2(size) times log10(loss) that a point between the two could add at most.
    """
    areas = [
        (
            np.log2(large.size_bytes / small.size_bytes)
            * np.log10(max(small.loss, 1e-12) / max(large.loss, 1e-12)),
            at,
        )
        for at, (small, large) in enumerate(pairwise(front))
    ]
    return sorted(((float(area), at) for area, at in areas), key=lambda gap: (-gap[0], gap[1]))
