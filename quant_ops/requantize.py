"""From wide integers to codes: a multiplier, an offset and a shift. See REQUANTIZATION.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quant_ops.errors import VerificationError

Integers = NDArray[np.int64]
Doubles = NDArray[np.float64]

MAX_SHIFT = 62
MULTIPLIER_LIMIT = 2**31 - 1
PRODUCT_LIMIT = 3 * 2**61  # leaves a quarter of int64 for the rounding of this very check
WIDE_LIMIT = 2**24  # such an integer times a power of two is exact in float32


@dataclass(frozen=True, slots=True)
class Codes:
    """What the integers of one value mean: x = scale * (code - zero_point), low <= code <= high.

    `scale` is a float32 number. The narrowest C type that holds low..high stores the codes.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def reach(self) -> tuple[int, int]:
        """Smallest and largest code - zero_point, zero included."""
        return min(self.low - self.zero_point, 0), max(self.high - self.zero_point, 0)

    @property
    def bound(self) -> int:
        """Largest |code - zero_point|."""
        low, high = self.reach
        return max(-low, high)

    def quantize(self, x: NDArray[np.floating]) -> Integers:
        """Codes nearest to `x`: x / scale in float32, halves to even, saturated. x: any shape."""
        with np.errstate(over="ignore"):
            steps = np.rint(x.astype(np.float32) / np.float32(self.scale))
        clipped = np.clip(steps, self.low - self.zero_point, self.high - self.zero_point)
        codes: Integers = clipped.astype(np.int64) + self.zero_point
        return codes

    def dequantize(self, codes: Integers) -> NDArray[np.float32]:
        """float32 values: one rounding, in the product with the scale."""
        values: NDArray[np.float32] = (codes - self.zero_point).astype(np.float32)
        values *= np.float32(self.scale)
        return values


def wide_codes(largest: float) -> Codes:
    """Integers of at most 2^24 for a network output whose magnitude is proven <= `largest`.

    The scale is a power of two, so that integers and their float32 values sort alike.
    """
    scale = 2.0 ** math.ceil(math.log2(largest / WIDE_LIMIT)) if largest > 0 else 1.0
    return Codes(max(scale, 2.0**-126), 0, -WIDE_LIMIT, WIDE_LIMIT)


@dataclass(frozen=True, slots=True, eq=False)
class Rescale:
    """code = clamp(((sum of accumulator * multiplier + offset) >> shift) + zero_point).

    The shift is arithmetic (floor). `offset` holds the constant (bias) and half a unit of the
    result, hence the rounding is floor(x + 1/2). Multipliers fit int32, all sums fit int64.

    Attributes:
        multipliers: one array for each accumulator; its shape broadcasts against the result.
        offset, shift: arrays of that shape.
        zero_point, low, high: of the result; a fused clamp has narrowed low and high.
    """

    multipliers: tuple[Integers, ...]
    offset: Integers
    shift: Integers
    zero_point: int
    low: int
    high: int

    @classmethod
    def fitted(
        cls,
        ratios: Sequence[Doubles],
        bounds: Sequence[Doubles],
        constant: Doubles,
        codes: Codes,
    ) -> Self:
        """The most precise multipliers that cannot overflow, with one shift for all terms.

        Args:
            ratios: for each accumulator its scale divided by that of the result; the arrays of all
                accumulators and of `constant` broadcast to one shape.
            bounds: for each accumulator the largest magnitude it can take.
            constant: what is added, in units of the result's scale.
            codes: meaning of the result.
        """
        shape = np.broadcast_shapes(*(r.shape for r in ratios), constant.shape)
        shift = np.full(shape, MAX_SHIFT, np.int64)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite: too big as well
            while True:
                multipliers, offset, worst = _scaled(ratios, bounds, constant, shift)
                too_big = ~(worst <= PRODUCT_LIMIT)
                for multiplier in multipliers:
                    too_big = too_big | (np.abs(multiplier) > MULTIPLIER_LIMIT)
                too_big &= shift > 0
                if not too_big.any():
                    break
                shift = shift - too_big
        if not (worst <= PRODUCT_LIMIT).all():
            raise VerificationError(
                f"a rescaling by {max(float(np.abs(r).max()) for r in ratios):g} exceeds 64-bit "
                f"integers; the scale {codes.scale:g} of its result is not a sound one"
            )
        multipliers = [np.clip(m, -MULTIPLIER_LIMIT, MULTIPLIER_LIMIT) for m in multipliers]
        half = (np.int64(1) << shift) >> 1
        return cls(
            tuple(np.asarray(m, np.int64) for m in multipliers),
            np.asarray(np.asarray(offset, np.int64) + half),
            np.asarray(shift),
            codes.zero_point,
            codes.low,
            codes.high,
        )

    def __call__(self, *accumulators: Integers) -> Integers:
        """Codes of the result."""
        total: Integers = self.offset + accumulators[0] * self.multipliers[0]
        for accumulator, multiplier in zip(accumulators[1:], self.multipliers[1:], strict=True):
            total = total + accumulator * multiplier
        codes: Integers = np.clip((total >> self.shift) + self.zero_point, self.low, self.high)
        return codes


def _scaled(
    ratios: Sequence[Doubles], bounds: Sequence[Doubles], constant: Doubles, shift: Integers
) -> tuple[list[Doubles], Doubles, Doubles]:
    """Multipliers, constant and largest sum at 2^shift."""
    multipliers = [np.rint(np.ldexp(ratio, shift)) for ratio in ratios]
    offset = np.rint(np.ldexp(constant, shift))
    worst = np.abs(offset) + np.ldexp(0.5, shift)
    for multiplier, bound in zip(multipliers, bounds, strict=True):
        worst = worst + np.abs(multiplier) * bound
    return multipliers, offset, worst
