"""Symbols of integers as da4ml has them: rescaled, pooled, multiplied by constants."""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.sharing import signed_digits
from quant_ops.narrow import NarrowRescale
from quant_ops.program import Move

Wires: TypeAlias = NDArray[np.object_]
"""Symbols of code - zero_point, the batch of one first."""

POOL = "max_pool2d.default"


def each(function: Callable[[Any], Any], wires: Wires) -> Wires:
    out = np.empty(wires.shape, object)
    out.reshape(-1)[:] = [function(v) for v in wires.reshape(-1)]
    return out


def clamped_floor(rescale: NarrowRescale, wires: Sequence[Any]) -> Any:
    """clamp(floor((sum + offset) / 2^shift)), zero point taken off."""
    unit = 2.0**-rescale.shift
    pairs = zip(wires, rescale.multipliers, strict=True)
    products = [_multiple(w, m, unit) for w, m in pairs if m]
    value = reduce(lambda a, b: a + b, products, rescale.offset * unit)
    if isinstance(value, float):  # nothing is left but the constant
        nothing = [np.zeros((), np.int64)] * len(wires)
        return wires[0].from_const(float(rescale(*nothing)), wires[0].hwconf)
    reach = max(-value.low, value.high + 1, 1)
    floored = value.quantize(1, int(reach).bit_length(), 0, "WRAP", "TRN")
    low, high = rescale.low - rescale.zero_point, rescale.high - rescale.zero_point
    return floored.max_of(low).min_of(high)


def _multiple(wire: Any, multiplier: int, unit: float) -> Any:
    """wire * multiplier * unit from signed digits, the highest first.

    da4ml keeps a symbol's place value, that of the first term of a sum, for good; with the lowest
    digit first it would drift by the whole shift at every layer, and out of what constants hold.
    """
    (digits,) = signed_digits(np.array([multiplier]))
    places = np.flatnonzero(digits)[::-1].tolist()
    terms = [wire * (float(digits[place]) * 2.0**place * unit) for place in places]
    while len(terms) > 1:
        pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
        terms = [reduce(lambda a, b: a + b, pair) for pair in pairs]
    return terms[0]


def pooled(step: Move, source: Wires) -> Wires:
    kernel, stride = pair(step.args[1]), pair(step.args[2] if len(step.args) > 2 else ())
    stride = stride or kernel
    shape = [(n - k) // s + 1 for n, k, s in zip(source.shape[2:], kernel, stride, strict=True)]
    rows, columns = (
        [slice(p * s, p * s + k) for p in range(n)]
        for n, s, k in zip(shape, stride, kernel, strict=True)
    )
    out = np.empty((1, source.shape[1], *shape), object)
    for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
        window = source[0, :, row, column].reshape(source.shape[1], -1)
        out[0, :, i, j] = [reduce(lambda a, b: a.max_of(b), wires) for wires in window]
    return out


def is_plain_pool(step: Move) -> bool:
    padding = pair(step.args[3]) if len(step.args) > 3 else (0, 0)
    dilation = pair(step.args[4]) if len(step.args) > 4 else (1, 1)
    ceil = step.args[5] if len(step.args) > 5 else False
    whole = max(padding, default=0) == 0 and max(dilation, default=1) == 1 and not ceil
    return step.op == POOL and whole


def pair(arg: Any) -> tuple[int, ...]:
    if isinstance(arg, int):
        return arg, arg
    return tuple(arg) * 2 if len(arg) == 1 else tuple(arg)
