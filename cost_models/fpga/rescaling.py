"""The cheapest constants that give the codes of a rescaling, for every value of its accumulator.

REQUANTIZATION.md multiplies by 31 bits. A circuit pays for each signed digit of a multiplier, and
an accumulator of 15 bits that becomes one of 16 codes cannot tell most of them apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.narrow import NarrowRescale, narrowed

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

    @property
    def narrow(self) -> NarrowRescale:
        """The same constants, as for a sum of one term."""
        return NarrowRescale((self.multiplier,), self.offset, self.shift, 0, self.low, self.high)


def cheapest(exact: Fixed, low: int, high: int) -> Fixed:
    """Constants with few digits that agree with `exact` wherever low <= accumulator <= high.

    They are those of `quant_ops.narrow`, which an exported circuit has too.

    Args:
        exact: positive multiplier, or 0.
        low: smallest accumulator.
        high: largest.

    Raises:
        ValueError: a negative multiplier, or more codes than a circuit would have.
    """
    if exact.multiplier < 0 or exact.high - exact.low > MAX_CODES:
        raise ValueError(f"{exact} is no rescaling to at most {MAX_CODES} codes")
    if exact.multiplier == 0 or exact.low == exact.high:
        code = int(np.clip(exact.offset >> exact.shift, exact.low, exact.high))
        return Fixed(0, code, 0, exact.low, exact.high)
    found = narrowed(exact.narrow, (low, high))
    return Fixed(found.multipliers[0], found.offset, found.shift, exact.low, exact.high)
