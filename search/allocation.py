"""Which width for which layer: the multiple-choice knapsack, exactly.

One choice is made per group (a layer, or layers tied together). Losses and costs add up over
groups: minimise sum_g loss[g][x_g] subject to sum_g cost[g][x_g] <= limit for every budget.
The integer program is solved by HiGHS; the convex hull of the whole front needs no solver at
all [Shoham1988].
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from search.quiet import native_stdout_discarded

Values: TypeAlias = Sequence[NDArray[np.float64]]  # per group, one number per choice
Choice: TypeAlias = tuple[int, ...]  # per group, the position chosen

_optimize: Any = optimize  # scipy carries no types
_sparse: Any = sparse

NODE_LIMIT = 50_000  # bounds the solver by work, not by time, so that results repeat
OBJECTIVE_SPAN = 1e5  # HiGHS stops at an absolute gap of 1e-6, so the objective is scaled to this
ATTEMPTS = 4  # solutions can exceed a limit by the solver's tolerance; it is tightened and redone


def total(values: Values, choice: Sequence[int]) -> float:
    """Sum over groups of the chosen values."""
    return float(sum(group[at] for group, at in zip(values, choice, strict=True)))


def finite_losses(losses: Values) -> list[NDArray[np.float64]]:
    """The losses with NaN and inf replaced by ten times the largest finite span of all groups."""
    finite = np.concatenate([group[np.isfinite(group)] for group in losses] or [np.zeros(0)])
    huge = 10.0 * float(np.abs(finite).sum()) + 1.0 if finite.size else 1.0
    return [np.where(np.isfinite(group), group, huge) for group in losses]


def allocate(
    losses: Values, costs: Mapping[str, Values], limits: Mapping[str, float]
) -> Choice | None:
    """The choice of least loss inside every limit, or None if there is none.

    Args:
        losses: per group, loss of each choice; NaN and inf count as huge.
        costs: cost name to per-group costs of each choice.
        limits: cost name to inclusive limit; a cost without a limit is ignored.
    """
    assert set(limits) <= set(costs), "every limit needs its costs"
    if not losses:
        return () if all(limit >= 0 for limit in limits.values()) else None
    losses = finite_losses(losses)
    kept = [undominated(loss, [costs[name][g] for name in limits]) for g, loss in enumerate(losses)]
    if len(limits) == 1:
        name = next(iter(limits))
        near = _near_optimal(
            [loss[keep] for loss, keep in zip(losses, kept, strict=True)],
            [cost[keep] for cost, keep in zip(costs[name], kept, strict=True)],
            limits[name],
        )
        kept = [keep[useful] for keep, useful in zip(kept, near, strict=True)]
    reduced = [loss[keep] for loss, keep in zip(losses, kept, strict=True)]
    tables = {
        name: [cost[keep] for cost, keep in zip(costs[name], kept, strict=True)] for name in limits
    }
    tightened = dict(limits)
    for _ in range(ATTEMPTS):
        solved = _solve(reduced, tables, tightened)
        if solved is None:
            return None
        excess = {name: total(tables[name], solved) - limits[name] for name in limits}
        over = {name: e for name, e in excess.items() if e > 1e-12 * abs(limits[name])}
        if not over:
            return tuple(int(keep[at]) for keep, at in zip(kept, solved, strict=True))
        for name, e in over.items():
            tightened[name] -= e
    return None


def allocate_many(
    losses: Values, costs: Mapping[str, Values], limits: Iterable[Mapping[str, float]]
) -> list[Choice | None]:
    """`allocate` at each of several sets of limits, for sizes between the vertices of `sweep`."""
    return [allocate(losses, costs, limit) for limit in limits]


def sweep(losses: Values, sizes: Values) -> list[Choice]:
    """Every vertex of the lower convex hull of (total size, total loss), smallest first.

    The same front as minimising loss + multiplier * size for every multiplier >= 0: per group
    the hull's steps have falling gains per byte, and merging all groups' steps by gain gives the
    total's. Where steps of several groups have the same gain, the points between are given too.
    O(n log n) in the number of choices.
    """
    losses = finite_losses(losses)
    hulls = [lower_hull(size, loss) for size, loss in zip(sizes, losses, strict=True)]
    steps: list[tuple[float, int, int]] = []
    for g, hull in enumerate(hulls):
        for narrow, wide in pairwise(hull):
            gain = (losses[g][narrow] - losses[g][wide]) / (sizes[g][wide] - sizes[g][narrow])
            steps.append((-float(gain), g, wide))
    current = [hull[0] for hull in hulls]
    front = [tuple(current)]
    # within a group gains fall strictly, so that the sort keeps each group's steps in order
    for _, g, wide in sorted(steps, key=lambda step: step[0]):
        current[g] = wide
        front.append(tuple(current))
    return front


def lower_hull(sizes: NDArray[np.float64], losses: NDArray[np.float64]) -> list[int]:
    """Positions of the vertices of the lower-left convex hull, from smallest to least loss."""
    order = np.lexsort((losses, sizes))
    hull: list[int] = []
    for at in (int(i) for i in order):
        if hull and losses[at] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(sizes, losses, hull[-2], hull[-1]) <= _gain(
            sizes, losses, hull[-2], at
        ):
            hull.pop()
        hull.append(at)
    return hull


def _gain(sizes: NDArray[np.float64], losses: NDArray[np.float64], narrow: int, wide: int) -> float:
    return float((losses[narrow] - losses[wide]) / (sizes[wide] - sizes[narrow]))


def undominated(
    loss: NDArray[np.float64], costs: Sequence[NDArray[np.float64]]
) -> NDArray[np.intp]:
    """Positions of the choices that no other one equals or beats in loss and every cost."""
    table = np.stack([loss, *costs], axis=1)
    no_worse = (table[:, None, :] <= table[None, :, :]).all(axis=2)
    better = no_worse & (table[:, None, :] < table[None, :, :]).any(axis=2)
    first = np.tril(no_worse & no_worse.T, -1).any(axis=1)  # an equal one comes before
    return np.flatnonzero(~better.any(axis=0) & ~first)


def _near_optimal(losses: Values, sizes: Values, limit: float) -> list[NDArray[np.bool_]]:
    """Per group the choices that an optimal solution under one limit can contain.

    With the multiplier of the hull's edge at the limit, the Lagrangian gives a lower bound for
    every choice; what cannot beat a greedy solution is dropped [Pisinger1995]. Usually a few
    groups with two or three choices are left.
    """
    front = sweep(losses, sizes)
    totals = np.array([total(sizes, choice) for choice in front])
    inside = int(np.searchsorted(totals, limit, side="right")) - 1
    if inside < 0 or inside == len(front) - 1:
        return [np.ones(len(loss), dtype=bool) for loss in losses]
    left, right = front[inside], front[inside + 1]
    multiplier = (total(losses, left) - total(losses, right)) / (
        totals[inside + 1] - totals[inside]
    )
    best = min(
        total(losses, _fill_up(losses, sizes, limit, start))
        for start in (left, _squeezed(losses, sizes, limit, right))
    )
    adjusted = [loss + multiplier * size for loss, size in zip(losses, sizes, strict=True)]
    bound = sum(float(group.min()) for group in adjusted) - multiplier * limit
    slack = best - bound + 1e-9 * max(abs(best), abs(bound))
    return [group - group.min() <= slack for group in adjusted]


def _fill_up(losses: Values, sizes: Values, limit: float, choice: Choice) -> Choice:
    """Greedily change one group at a time to what lowers the loss most and still fits."""
    current = list(choice)
    while True:
        left = limit - total(sizes, current)
        best = (0.0, -1, -1)
        for g, (loss, size) in enumerate(zip(losses, sizes, strict=True)):
            gain = np.where(size - size[current[g]] <= left, loss[current[g]] - loss, 0.0)
            at = int(gain.argmax())
            best = max(best, (float(gain[at]), g, at))
        if best[0] <= 0:
            return tuple(current)
        current[best[1]] = best[2]


def _squeezed(losses: Values, sizes: Values, limit: float, choice: Choice) -> Choice:
    """The one change of one group that makes a choice fit at the least loss."""
    over = total(sizes, choice) - limit
    changes = [
        (float(loss[at] - loss[now]), g, at)
        for g, (loss, size, now) in enumerate(zip(losses, sizes, choice, strict=True))
        for at in range(len(loss))
        if size[now] - size[at] >= over
    ]
    # the vertex before this one differs in one group, so there is always a change
    _, g, at = min(changes)
    return (*choice[:g], at, *choice[g + 1 :])


def _solve(
    losses: Values, costs: Mapping[str, Values], limits: Mapping[str, float]
) -> Choice | None:
    n_choices = [len(group) for group in losses]
    starts = np.cumsum([0, *n_choices])
    objective = np.concatenate([group - group.min() for group in losses])
    span = float(objective.max())
    if span > 0:
        objective *= OBJECTIVE_SPAN / span
    group_of = np.repeat(np.arange(len(losses)), n_choices)
    one_each = _sparse.csr_array(
        (np.ones(len(objective)), (group_of, np.arange(len(objective)))),
        shape=(len(losses), len(objective)),
    )
    constraints = [_optimize.LinearConstraint(one_each, 1.0, 1.0)]
    for name, limit in limits.items():
        # relative to the cheapest choice of each group: smaller numbers, less rounding
        left = limit - sum(float(group.min()) for group in costs[name])
        if left < -1e-12 * abs(limit):
            return None
        row = np.concatenate([group - group.min() for group in costs[name]])
        largest = float(row.max()) or 1.0
        constraints.append(
            _optimize.LinearConstraint(row[None, :] / largest, -np.inf, max(left, 0) / largest)
        )
    with native_stdout_discarded():
        result = _optimize.milp(
            objective,
            integrality=np.ones(len(objective)),
            bounds=(0.0, 1.0),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT},
        )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(starts))
