"""Data movement with static shapes: any operator that only moves codes, as a few short tables.

Which input element each output element copies is found by moving the element numbers themselves.
The resulting map is split along the divisors of its length until it is a sum of short tables, so
that a transposition, a strided slice with padding or a gathering of channels costs some bytes
of read-only data instead of one entry for each element.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.int64]
HOLE = -1
_SHORT = 8  # entries; a shorter table is not worth splitting


@dataclass(frozen=True, slots=True)
class Axis:
    """Where output position i along one loop lies in the source.

    Attributes:
        count: positions.
        stride: offset between neighbours, if `table` is empty.
        table: offset of each position, None for a hole (it holds the zero point).
    """

    count: int
    stride: int = 0
    table: tuple[int | None, ...] = ()


def is_identity(positions: Map, n_source: int) -> bool:
    """Whether a map copies all of its source in order."""
    return positions.size == n_source and bool((positions == np.arange(n_source)).all())


def loops(positions: Map) -> tuple[int, tuple[Axis, ...]]:
    """A start and loops, outermost first, whose offsets add up to `positions` (-1 for a hole)."""
    flat = positions.reshape(-1)
    copied = flat != HOLE
    start = int(flat[copied].min()) if copied.any() else 0
    return start, _loops(np.where(copied, flat - start, HOLE))


def _loops(flat: Map) -> tuple[Axis, ...]:
    axis = _affine(flat)
    if axis is not None:
        return (axis,)
    split = _best_split(flat) if flat.size > _SHORT else None
    if split is None:
        return (Axis(flat.size, table=tuple(None if p == HOLE else int(p) for p in flat)),)
    outer, inner = split
    return _loops(outer) + _loops(inner)


def _affine(flat: Map) -> Axis | None:
    """One loop without a table."""
    if (flat == HOLE).any() or flat[0] != 0:
        return None
    stride = int(flat[1]) if flat.size > 1 else 0
    if stride < 0 or (flat != np.arange(flat.size) * stride).any():
        return None
    return Axis(flat.size, stride)


def _best_split(flat: Map) -> tuple[Map, Map] | None:
    best: tuple[Map, Map] | None = None
    cost = flat.size
    for inner in _divisors(flat.size):
        outer = flat.size // inner
        parts = _separate(flat.reshape(outer, inner))
        if parts is None:
            continue
        price = sum(0 if _affine(part) is not None else part.size for part in parts)
        if price < cost:
            best, cost = parts, price
    return best


def _divisors(n: int) -> list[int]:
    small = [d for d in range(2, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _separate(matrix: Map) -> tuple[Map, Map] | None:
    """Row and column offsets whose sums are `matrix`; a hole is a hole of its row or column."""
    holes = matrix == HOLE
    rows, columns = holes.all(1), holes.all(0)
    if rows.all() or not (holes == (rows[:, None] | columns[None])).all():
        return None
    first_row, first_column = int(np.argmin(rows)), int(np.argmin(columns))
    base = matrix[first_row, first_column]
    outer = np.where(rows, HOLE, matrix[:, first_column])
    inner = np.where(columns, HOLE, matrix[first_row] - base)
    # An offset of its own is never negative: the smaller one is moved into the rows.
    least = inner[~columns].min()
    inner = np.where(columns, HOLE, inner - least)
    outer = np.where(rows, HOLE, outer + least)
    sums = np.where(holes, HOLE, outer[:, None] + inner[None])
    return (outer, inner) if (sums == matrix).all() else None
