"""Fixed-point types that hold given values, and the ones whose saturation is a given clamp."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 64
MIN_WIDTH = 2  # hls4ml has products of their own for types of one bit


@dataclass(frozen=True, slots=True)
class Fixed:
    """A type ap_fixed or ap_ufixed: floor(x * 2^fraction) in `width` bits.

    Attributes:
        width: all bits, a sign included.
        fraction: bits after the point.
        signed: whether there is a sign.
        saturates: whether values beyond the type become its limits; else they must not occur.
    """

    width: int
    fraction: int = 0
    signed: bool = True
    saturates: bool = False

    def __str__(self) -> str:
        kind = "fixed" if self.signed else "ufixed"
        limits = ",TRN,SAT" if self.saturates else ",TRN,WRAP"
        return f"{kind}<{self.width},{self.width - self.fraction}{limits}>"


def holding(low: int, high: int, fraction: int = 0) -> Fixed:
    """The narrowest type of all multiples of 2^-fraction from low to high (in such units).

    >>> str(holding(0, 255)), str(holding(-3, 4, fraction=1))
    ('ufixed<8,8,TRN,WRAP>', 'fixed<4,3,TRN,WRAP>')
    """
    signed = low < 0
    bits = max(high.bit_length(), (-low - 1).bit_length() if signed else 0) + signed
    return Fixed(max(bits, MIN_WIDTH), fraction, signed)


def exactly(values: NDArray[np.float64]) -> Fixed:
    """The narrowest type of these real numbers, each a multiple of some power of two."""
    numerators, shifts = [], []
    for value in values.reshape(-1).tolist():
        numerator, denominator = value.as_integer_ratio()
        numerators.append(numerator)
        shifts.append(denominator.bit_length() - 1)
    fraction = max(shifts, default=0)
    scaled = [n << (fraction - s) for n, s in zip(numerators, shifts, strict=True)]
    return holding(min([0, *scaled]), max([0, *scaled]), fraction)


def clamping(limits: tuple[int, int], reach: tuple[int, int]) -> Fixed | None:
    """A type that takes every integer of `reach` to its clamp to `limits`; None: there is none.

    >>> str(clamping((0, 255), (-9000, 9000))), clamping((0, 200), (-9, 201))
    ('ufixed<8,8,TRN,SAT>', None)
    """
    low, high = limits
    least, most = reach
    cuts_low, cuts_high = least < low, most > high
    if not (cuts_low or cuts_high):
        return holding(least, most)
    for signed, width in product((False, True), range(MIN_WIDTH, MAX_WIDTH)):
        bottom, top = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
        right_low = bottom == low if cuts_low else bottom <= least
        right_high = top == high if cuts_high else top >= most
        if right_low and right_high:
            return Fixed(width, 0, signed, saturates=True)
    return None
