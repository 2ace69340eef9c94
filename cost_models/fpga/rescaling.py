"""The cheapest constants that give the codes of a rescaling, for every value of its accumulator.

REQUANTIZATION.md multiplies by 31 bits. A circuit pays for each signed digit of a multiplier, and
an accumulator of 15 bits that becomes one of 16 codes cannot tell most of them apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.sharing import signed_digits

_LOOK_FURTHER = 2  # shifts beyond the first that works, for one with fewer digits
MAX_CODES = 4096  # of the result; more is what leaves the network, which is not rescaled


@dataclass(frozen=True, slots=True)
class Fixed:
    """code = clamp((accumulator * multiplier + offset) >> shift, low, high)."""

    multiplier: int
    offset: int
    shift: int
    low: int
    high: int

    def __call__(self, accumulators: NDArray[np.int64]) -> NDArray[np.int64]:
        """Codes of accumulators."""
        total = accumulators * self.multiplier + self.offset
        codes: NDArray[np.int64] = np.clip(total >> self.shift, self.low, self.high)
        return codes


def cheapest(exact: Fixed, low: int, high: int) -> Fixed:
    """Constants with few digits that agree with `exact` wherever low <= accumulator <= high.

    A rescaling with a positive multiplier is a staircase: code c or more from accumulator t(c)
    on. Constants agree if and only if they have the same steps in the range, which leaves an
    interval of offsets for every multiplier and shift.

    Args:
        exact: positive multiplier, or 0.
        low: smallest accumulator.
        high: largest.

    Raises:
        ValueError: a negative multiplier, or more codes than a circuit would have.
    """
    if exact.multiplier < 0 or exact.high - exact.low > MAX_CODES:
        raise ValueError(f"{exact} is no rescaling to at most {MAX_CODES} codes")
    codes = list(range(exact.low + 1, exact.high + 1))
    if exact.multiplier == 0 or not codes:
        code = int(np.clip(exact.offset >> exact.shift, exact.low, exact.high))
        return Fixed(0, code, 0, exact.low, exact.high)
    steps = [-((exact.offset - (c << exact.shift)) // exact.multiplier) for c in codes]
    reached = [(c, max(t, low)) for c, t in zip(codes, steps, strict=True) if t <= high]
    missed = [(c, min(t, high + 1) - 1) for c, t in zip(codes, steps, strict=True) if t > low]
    found: list[tuple[int, int, Fixed]] = []
    first: int | None = None
    for shift in range(exact.shift + 1):
        if first is not None and shift > first + _LOOK_FURTHER:
            break
        middle = exact.multiplier >> (exact.shift - shift)
        for multiplier in range(max(middle - 1, 0), middle + 3):
            offset = _offset(multiplier, shift, reached, missed)
            if offset is not None:
                first = shift if first is None else first
                digits = int(np.abs(signed_digits(np.array([multiplier]))).sum())
                fixed = Fixed(multiplier, offset, shift, exact.low, exact.high)
                found.append((digits, shift, fixed))
    return min(found, key=lambda item: item[:2])[2] if found else exact


def _offset(
    multiplier: int, shift: int, reached: list[tuple[int, int]], missed: list[tuple[int, int]]
) -> int | None:
    """The offset with the most zeros at its end that makes every step, None if there is none."""
    low = max(((c << shift) - t * multiplier for c, t in reached), default=None)
    high = min(((c << shift) - t * multiplier - 1 for c, t in missed), default=None)
    if low is None or high is None:
        return low if low is not None else high
    if low > high:
        return None
    zeros = 0
    while -(-low >> (zeros + 1)) << (zeros + 1) <= high and zeros < 62:
        zeros += 1
    return -(-low >> zeros) << zeros
