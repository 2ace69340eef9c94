"""Rescalings as da4ml's symbols, the same in circuits that are priced and that are exported."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from cost_models.fpga.quantizer import digits_of
from quant_ops.narrow import NarrowRescale


def clamped_floor(rescale: NarrowRescale, wires: Sequence[Any]) -> Any:
    """clamp(floor((sum + offset) / 2^shift)), zero point taken off."""
    unit = 2.0**-rescale.shift
    together = max(float(wire.latency) for wire in wires)
    pairs = zip([_held(wire, together) for wire in wires], rescale.multipliers, strict=True)
    products = [_multiple(w, m, unit) for w, m in pairs if m]
    value = reduce(lambda a, b: a + b, products, rescale.offset * unit)
    if isinstance(value, float):  # nothing is left but the constant
        nothing = [np.zeros((), np.int64)] * len(wires)
        value = float(rescale(*nothing)) - rescale.zero_point
        return wires[0].from_const(value, wires[0].hwconf)
    reach = max(-value.low, value.high + 1, 1)
    floored = value.quantize(1, int(reach).bit_length(), 0, "WRAP", "TRN")
    low, high = rescale.low - rescale.zero_point, rescale.high - rescale.zero_point
    return floored.max_of(low).min_of(high)


def _held(wire: Any, depth: float) -> Any:
    """The same value at a later depth.

    da4ml computes as early as it can; a product that waits for another operand would be held at
    three times the width of its code.
    """
    if wire.latency >= depth or wire.low == wire.high:
        return wire
    held = wire.quantize(*wire.kif, _force_factor_clear=True)
    held.latency = depth
    return held


def _multiple(wire: Any, multiplier: int, unit: float) -> Any:
    """wire * multiplier * unit from signed digits, the highest first.

    da4ml keeps a symbol's place value, that of the first term of a sum, for good; with the lowest
    digit first it would drift by the whole shift at every layer, and out of what constants hold.
    """
    terms = [wire * (sign * 2.0**place * unit) for place, sign in digits_of(multiplier)]
    product = tree(lambda a, b: a + b, terms)
    low, high = sorted(float(end) * multiplier * unit for end in (wire.low, wire.high))
    return within(product, low, high)


def tree(operation: Callable[[Any, Any], Any], values: Iterable[Any]) -> Any:
    """The operation on all values: neighbours first, so that few follow each other."""
    left = list(values)
    while len(left) > 1:
        pairs = [left[at : at + 2] for at in range(0, len(left), 2)]
        left = [operation(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return left[0]


def within(value: Any, low: float, high: float) -> Any:
    """The value without the bits that its terms, taken apart, could reach but their sum cannot."""
    step = float(value.step)
    whole = int(np.ceil(np.log2(max(-low, high + step))))
    return value.quantize(int(low < 0), whole, int(-np.log2(step)), "WRAP", "TRN")
