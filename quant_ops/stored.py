"""How scales and biases are stored: one float32 base per layer times narrow per-channel factors.

Quantization always uses the stored, rounded values, so file and search agree to the bit.
A float16 scale per channel would fall below its normal range in folded networks (channels
with a vanishing batch-norm gain); relative to the largest scale of the layer nothing does.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

MANTISSA = 16  # sixteen steps per octave: a stored scale is within 3.2 % of the wanted one
MAX_EXPONENT = 15
BIAS_MAX = 32767
TOP_RATIO = 31 / 32  # the largest stored factor


@dataclass(frozen=True, slots=True, eq=False)
class StoredScale:
    """scale = base * (16 + m) / 32 * 2^-e with the byte r = 16 e + (15 - m): larger is smaller.

    base: float32 scalar; ratio: uint8 of any shape, one per channel (or channel and group).
    """

    base: np.float32
    ratio: NDArray[np.uint8]

    @classmethod
    def nearest(cls, wanted: NDArray[np.floating]) -> Self:
        """The stored scales nearest (in ratio) to `wanted`, any shape, all positive or zero.

        The largest scale is stored exactly up to its base; zeros become the smallest scale.
        """
        wide = np.asarray(wanted, dtype=np.float64)
        top = float(wide.max(initial=0.0))
        base = np.float32(top if top > 0 else 1.0) * np.float32(32 / 31)
        return cls.nearest_from(base, wide)

    def moved(self, factor: NDArray[np.floating]) -> "StoredScale":
        """The stored scales nearest to these times `factor` (broadcastable), on the same grid.

        The base is kept, or doubled as often as the largest scale needs: a factor of nearly 1
        changes nothing.
        """
        wide = self.values.astype(np.float64) * factor
        base, top = self.base, float(wide.max(initial=0.0))
        while top > float(base) * TOP_RATIO * 1.016:
            base = np.float32(base * 2)
        return self.nearest_from(base, wide)

    @classmethod
    def nearest_from(cls, base: np.float32, wanted: NDArray[np.floating]) -> Self:
        """The stored scales nearest to `wanted` that share a given base."""
        grid = ratio_values().astype(np.float64) * float(base)
        log_grid = np.log2(grid[::-1])  # ascending
        middle = (log_grid[1:] + log_grid[:-1]) / 2
        with np.errstate(divide="ignore"):
            position = np.searchsorted(middle, np.log2(np.asarray(wanted, np.float64)))
        return cls(base, (255 - position).astype(np.uint8))

    @property
    def values(self) -> NDArray[np.float32]:
        """The scales in float32: one exact factor, one rounding."""
        scales: NDArray[np.float32] = self.base * ratio_values()[self.ratio]
        return scales


def ratio_values() -> NDArray[np.float32]:
    """The 256 factors a ratio byte stands for, descending from 31/32; each exact in float32."""
    byte = np.arange(256)
    mantissa = MANTISSA + (MANTISSA - 1 - byte % MANTISSA)
    return (mantissa / (2.0 * MANTISSA) * 2.0 ** -(byte // MANTISSA)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class StoredBias:
    """bias = base * code, code a signed 16-bit integer; base: float32 scalar."""

    base: np.float32
    codes: NDArray[np.int16]

    @classmethod
    def nearest(cls, wanted: NDArray[np.floating]) -> Self:
        """The stored biases nearest to `wanted` (out_channels,)."""
        wide = np.asarray(wanted, dtype=np.float64)
        base = np.float32(np.abs(wide).max(initial=0.0) / BIAS_MAX)
        if not base > 0:
            return cls(np.float32(1.0), np.zeros(wide.shape, np.int16))
        codes = np.clip(np.rint(wide / float(base)), -BIAS_MAX, BIAS_MAX)
        return cls(base, codes.astype(np.int16))

    @property
    def values(self) -> NDArray[np.float32]:
        """The biases in float32."""
        biases: NDArray[np.float32] = self.base * self.codes.astype(np.float32)
        return biases
