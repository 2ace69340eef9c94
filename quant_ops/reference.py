"""Runs an integer program: in numpy (the referee of every export), and faster in torch.

Both compute the same integers, bit for bit. Matrix products run in floating point only where
every partial sum is proven to be an exact integer there: below 2^24 in float32, 2^53 in float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from quant_ops.edges import activation_edges
from quant_ops.executor import Transform
from quant_ops.machine import FLOAT32_EXACT, FLOAT64_EXACT, Array, Machine, Outputs
from quant_ops.program import Average, Concatenate, Convolution, IntegerProgram, Lookup, MatMul
from quant_ops.quantized import QuantizedModel
from quant_ops.requantize import Integers, Rescale
from quant_ops.torch_machine import TorchMachine


def run(program: IntegerProgram, inputs: Sequence[Array], keep: Sequence[str] = ()) -> Outputs:
    """Execute in numpy.

    Args:
        program: from `quant_ops.lowering.lower`.
        inputs: float32 or integer arrays, batch first.
        keep: names of quantized edges whose codes are returned.
    """
    return NumpyMachine(program).run(inputs, keep)


def run_torch(
    program: IntegerProgram, inputs: Sequence[Array], keep: Sequence[str] = ()
) -> Outputs:
    """The same integers as `run`, through torch's convolutions on the CPU."""
    return TorchMachine(program).run(inputs, keep)


def fake_quant_transforms(model: QuantizedModel) -> dict[int, Transform]:
    """Node index to the fake quantization of its value, for `Executor.run`."""
    return {
        edge.node: model.activations[edge.name].fake_quantize
        for edge in activation_edges(model.graph)
        if edge.name in model.activations
    }


class NumpyMachine(Machine):
    """Codes are int64 arrays."""

    def _to_numpy(self, value: Any) -> Integers:
        return value  # type: ignore[no-any-return]

    def _from_numpy(self, codes: Integers) -> Any:
        return codes

    def _to_torch(self, value: Any) -> Tensor:
        return torch.from_numpy(value.astype(np.float64))

    def _from_torch(self, value: Tensor) -> Any:
        return value.numpy().astype(np.int64)

    def _rescale(self, rescale: Rescale, *accumulators: Any) -> Any:
        return rescale(*accumulators)

    def _convolution(self, step: Convolution) -> Any:
        (x,) = self._centered(step)
        columns, positions = _columns(step, x)
        groups, out_channels = step.groups, len(step.weights)
        weights = step.weights.reshape(groups, out_channels // groups, -1)
        sums = _exact_product(columns, weights.transpose(0, 2, 1), step.bound)
        sums = sums.reshape(groups, len(x), -1, out_channels // groups)
        sums = sums.transpose(1, 0, 3, 2).reshape(len(x), out_channels, *positions)
        return step.rescale(sums)

    def _matmul(self, step: MatMul) -> Any:
        (x,) = self._centered(step)
        flat = x.reshape(1, -1, x.shape[-1])
        sums = _exact_product(flat, step.weights.T[None], step.bound)
        return step.rescale(sums.reshape(*x.shape[:-1], -1))

    def _lookup(self, step: Lookup) -> Any:
        rows = self._values[step.sources[0]].numpy()
        return step.rescale(step.weights.astype(np.int64))[rows]

    def _average(self, step: Average) -> Any:
        (x,) = self._centered(step)
        for axis, (start, end) in zip(step.axes, step.windows, strict=True):
            zero = np.zeros_like(x.take([0], axis))
            running = np.concatenate([zero, x.cumsum(axis)], axis)
            x = running.take(end, axis) - running.take(start, axis)
        if not step.keep_axes:
            x = x.squeeze(step.axes)
        return step.rescale(x)

    def _concatenate(self, step: Concatenate) -> Any:
        parts = zip(step.rescales, self._centered(step), strict=True)
        return np.concatenate([rescale(x) for rescale, x in parts], step.axis)


def _columns(step: Convolution, x: Integers) -> tuple[Array, tuple[int, ...]]:
    """Patches (groups, batch * positions, weights of a channel), and the output positions."""
    rank = x.ndim - 2
    spread = x
    if max(step.input_stride) > 1:
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], step.input_stride, strict=True)]
        spread = np.zeros((*x.shape[:2], *sizes), np.int64)
        spread[tuple(slice(None, None, n) for n in (1, 1, *step.input_stride))] = x
    pads = [(max(a, 0), max(b, 0)) for a, b in step.padding]
    padded = np.pad(spread, [(0, 0), (0, 0), *pads])
    for axis, (before, after) in enumerate(step.padding, start=2):
        padded = padded.take(range(max(-before, 0), padded.shape[axis] - max(-after, 0)), axis)
    kernel = step.weights.shape[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(step.dilation, kernel, strict=True)]
    windows = sliding_window_view(padded, spans, tuple(range(2, rank + 2)))
    every = [slice(None, None, n) for n in (1, 1, *step.stride, *step.dilation)]
    windows = windows[tuple(every)]
    batch, channels = x.shape[:2]
    positions = windows.shape[2 : rank + 2]
    grouped = windows.reshape(batch, step.groups, channels // step.groups, *windows.shape[2:])
    places, taps = range(3, rank + 3), range(rank + 3, 2 * rank + 3)
    order = (1, 0, *places, 2, *taps)
    columns = grouped.transpose(order).reshape(step.groups, batch * int(np.prod(positions)), -1)
    return columns, positions


def _exact_product(left: Array, right: Array, bound: int) -> Integers:
    """Integer matrix products (batched), exact because no partial sum exceeds `bound`."""
    if bound >= FLOAT64_EXACT:
        product: Integers = left.astype(np.int64) @ right.astype(np.int64)
        return product
    wide = np.float32 if bound < FLOAT32_EXACT else np.float64
    return (left.astype(wide) @ right.astype(wide)).astype(np.int64)  # type: ignore[no-any-return]
