"""Arrays of integers as da4ml's symbols, and pooling."""

from collections.abc import Callable
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.symbols import tree
from quant_ops.program import Move

Wires: TypeAlias = NDArray[np.object_]
"""Symbols of code - zero_point, the batch of one first."""

POOL = "max_pool2d.default"


def each(function: Callable[[Any], Any], wires: Wires) -> Wires:
    out = np.empty(wires.shape, object)
    out.reshape(-1)[:] = [function(v) for v in wires.reshape(-1)]
    return out


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
        out[0, :, i, j] = [tree(lambda a, b: a.max_of(b), wires) for wires in window]
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
