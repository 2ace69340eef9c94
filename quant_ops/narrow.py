"""Rescalings with the cheapest multipliers that still give every code exactly.

A `Rescale` has multipliers of up to 31 bits, since it is made without knowing which sums occur.
Logic that is laid out for one network pays for every digit. Where the sums are known to lie in a
range, a code only changes at a few of them, and a multiplier of a few digits that changes it at the
same ones is equal for every sum that can occur.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.requantize import Integers, Rescale

MAX_POINTS = 2**18  # of one channel: more are not checked, and the multiplier stays
_FURTHER = 2  # shifts that are tried beyond the first that works, for fewer digits


@dataclass(frozen=True, slots=True)
class NarrowRescale:
    """One channel: clamp(((sum of accumulator * multiplier + offset) >> shift) + zero_point).

    Python integers, so that a code generator may use them as they are.
    """

    multipliers: tuple[int, ...]
    offset: int
    shift: int
    zero_point: int
    low: int
    high: int

    def __call__(self, *accumulators: Integers) -> Integers:
        """Codes of integer arrays."""
        pairs = zip(self.multipliers, accumulators, strict=True)
        total: Integers = sum((m * a for m, a in pairs), np.array(self.offset, np.int64))
        codes: Integers = np.clip((total >> self.shift) + self.zero_point, self.low, self.high)
        return codes


@dataclass(frozen=True, eq=False)
class _Points:
    """Sums (terms, n) and what they must become; limits that saturation makes void are absent."""

    sums: Integers
    values: Integers
    has_lower: NDArray[np.bool_]
    has_upper: NDArray[np.bool_]


def channel_of(rescale: Rescale, channel: int) -> NarrowRescale:
    """One channel of a rescaling, as it is. Constants are read in C order, scalars serve all."""
    return NarrowRescale(
        tuple(_at(m, channel) for m in rescale.multipliers),
        _at(rescale.offset, channel),
        _at(rescale.shift, channel),
        rescale.zero_point,
        rescale.low,
        rescale.high,
    )


def narrowed(exact: NarrowRescale, *reaches: tuple[int, int]) -> NarrowRescale:
    """The rescaling of fewest signed digits that is equal wherever each sum lies in its reach.

    Args:
        exact: one channel.
        reaches: (smallest, largest) of each accumulator; integers in between may all occur.
    """
    points = _points(exact, reaches)
    if points is None:
        return exact
    best, tried = exact, 0
    for shift in range(exact.shift + 1):
        found = _cheapest(exact, points, shift)
        if found is not None and _digits(found) < _digits(best):
            best = found
        tried += found is not None
        if tried > _FURTHER:
            break
    return best


def csd_digits(value: int) -> int:
    """Nonzero digits of the canonical signed-digit form: adders of a constant product, plus one.

    >>> csd_digits(7), csd_digits(0), csd_digits(-10)
    (2, 0, 2)
    """
    value = abs(value)
    return (value ^ (3 * value)).bit_count()


def _at(constants: Integers, channel: int) -> int:
    flat = constants.reshape(-1)
    return int(flat[0] if flat.size == 1 else flat[channel])


def _digits(rescale: NarrowRescale) -> tuple[int, int]:
    return sum(csd_digits(m) for m in rescale.multipliers), rescale.shift


def _points(exact: NarrowRescale, reaches: tuple[tuple[int, int], ...]) -> _Points | None:
    """Where a code changes, or every combination of sums; None where those are too many."""
    if len(reaches) == 1:
        sums = _steps(exact, reaches[0])
    else:
        counts = [high - low + 1 for low, high in reaches]
        if float(np.prod([float(c) for c in counts])) > MAX_POINTS:
            return None
        axes = [np.arange(low, high + 1, dtype=np.int64) for low, high in reaches]
        sums = np.stack([axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij")])
    if sums is None:
        return None
    codes = exact(*sums)
    return _Points(sums, codes - exact.zero_point, codes > exact.low, codes < exact.high)


def _steps(exact: NarrowRescale, reach: tuple[int, int]) -> Integers | None:
    """(1, n) the ends of the reach, and the last and first sum of neighbouring codes."""
    low, high = reach
    if high - low < MAX_POINTS // 64:
        return np.arange(low, high + 1, dtype=np.int64)[None]
    (multiplier,) = exact.multipliers
    ends = exact(np.array([low, high]))
    n_codes = int(abs(ends[1] - ends[0]))
    if multiplier == 0 or n_codes > MAX_POINTS // 4:
        return None
    codes = np.arange(ends.min() + 1, ends.max() + 1, dtype=np.int64) - exact.zero_point
    reached = [((int(c) << exact.shift) - exact.offset) for c in codes]
    if multiplier > 0:
        first = np.array([-(-r // multiplier) for r in reached], np.int64)
        sums = np.concatenate([[low, high], first, first - 1])
    else:
        last = np.array([-(r // -multiplier) - (r % -multiplier != 0) for r in reached], np.int64)
        sums = np.concatenate([[low, high], last, last + 1])
    return np.unique(np.clip(sums, low, high))[None]


def _cheapest(exact: NarrowRescale, points: _Points, shift: int) -> NarrowRescale | None:
    """With this shift the fewest digits, if any multipliers near the exact ratios work."""
    cut = exact.shift - shift
    around = range(-1, 3) if len(exact.multipliers) == 1 else range(2)
    nearest = [[(m >> cut) + step for step in around] for m in exact.multipliers]
    combinations = np.stack(np.meshgrid(*nearest, indexing="ij")).reshape(len(nearest), -1).T
    found = []
    for multipliers in combinations.tolist():
        offset = _offset(multipliers, points, shift)
        if offset is not None:
            found.append(
                NarrowRescale(
                    tuple(multipliers), offset, shift, exact.zero_point, exact.low, exact.high
                )
            )
    return min(found, key=_digits, default=None)


def _offset(multipliers: list[int], points: _Points, shift: int) -> int | None:
    """The roundest offset that gives every point its value; None if there is none."""
    products = np.array(multipliers, np.int64) @ points.sums
    lower = (points.values << shift) - products
    upper = ((points.values + 1) << shift) - 1 - products
    least = int(lower[points.has_lower].max(initial=-(2**62)))
    most = int(upper[points.has_upper].min(initial=2**62))
    if least > most:
        return None
    for zeros in range(62, -1, -1):
        rounded = -(-least >> zeros) << zeros
        if rounded <= most:
            return rounded
    return least
