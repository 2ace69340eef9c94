"""The integer program in torch: the integers of the numpy referee, many times faster."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quant_ops.machine import FLOAT32_EXACT, FLOAT64_EXACT, Machine
from quant_ops.program import Average, Concatenate, Convolution, Lookup, MatMul, Multiply
from quant_ops.requantize import Integers, Rescale


class TorchMachine(Machine):
    """Codes are float32 tensors: exact, since no code exceeds 2^24."""

    def _to_numpy(self, value: Any) -> Integers:
        return value.numpy().astype(np.int64)  # type: ignore[no-any-return]

    def _from_numpy(self, codes: Integers) -> Any:
        return torch.from_numpy(codes).float()

    def _to_torch(self, value: Any) -> Tensor:
        return value  # type: ignore[no-any-return]

    def _from_torch(self, value: Tensor) -> Any:
        return value

    def _rescale(self, rescale: Rescale, *accumulators: Any) -> Any:
        multipliers = [torch.from_numpy(m) for m in rescale.multipliers]
        total = accumulators[0].long() * multipliers[0]
        for accumulator, multiplier in zip(accumulators[1:], multipliers[1:], strict=True):
            total = total + accumulator.long() * multiplier
        total = total.add_(torch.from_numpy(rescale.offset))
        total = total.bitwise_right_shift_(torch.from_numpy(rescale.shift))
        return total.add_(rescale.zero_point).clamp_(rescale.low, rescale.high).float()

    def _multiply(self, step: Multiply) -> Any:
        left, right = self._centered(step)
        return self._rescale(step.rescale, left.long() * right.long())

    def _convolution(self, step: Convolution) -> Any:
        return self._rescale(step.rescale, self._convolution_sums(step))

    def _convolution_sums(self, step: Convolution) -> Tensor:
        (x,) = self._centered(step)
        dtype = self._exact_dtype(step.bound)
        x = x.to(dtype)
        if max(step.input_stride) > 1:
            sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], step.input_stride, strict=True)]
            spread = x.new_zeros((*x.shape[:2], *sizes))
            spread[tuple(slice(None, None, n) for n in (1, 1, *step.input_stride))] = x
            x = spread
        padding: tuple[int, ...] = tuple(before for before, _ in step.padding)
        if any(a != b or a < 0 for a, b in step.padding):
            x = F.pad(x, [n for pair in reversed(step.padding) for n in pair])
            padding = (0,) * len(padding)
        weights = self._weights(step).to(dtype)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(padding) - 1]
        return convolve(x, weights, None, step.stride, padding, step.dilation, step.groups)

    def _matmul(self, step: MatMul) -> Any:
        return self._rescale(step.rescale, self._matmul_sums(step))

    def _matmul_sums(self, step: MatMul) -> Tensor:
        (x,) = self._centered(step)
        dtype = self._exact_dtype(step.bound)
        return F.linear(x.to(dtype), self._weights(step).to(dtype))

    def _weights(self, step: Convolution | MatMul | Lookup) -> Tensor:
        return torch.from_numpy(step.weights)

    def _lookup(self, step: Lookup) -> Any:
        table = self._rescale(step.rescale, self._weights(step))
        return table[self._values[step.sources[0]].long()]

    def _average(self, step: Average) -> Any:
        return self._rescale(step.rescale, self._average_sums(step))

    def _average_sums(self, step: Average) -> Tensor:
        (centered,) = self._centered(step)
        x: Tensor = centered.long()
        for axis, (start, end) in zip(step.axes, step.windows, strict=True):
            if len(start) == 1:
                x = x.narrow(axis, int(start[0]), int(end[0] - start[0])).sum(axis, keepdim=True)
                continue
            zero = torch.zeros_like(x.narrow(axis, 0, 1))
            running = torch.cat([zero, x.cumsum(axis)], axis)
            x = running.index_select(axis, torch.from_numpy(end)) - running.index_select(
                axis, torch.from_numpy(start)
            )
        return x if step.keep_axes else x.squeeze(step.axes)

    def _concatenate(self, step: Concatenate) -> Any:
        parts = zip(step.rescales, self._centered(step), strict=True)
        return torch.cat([self._rescale(rescale, x) for rescale, x in parts], step.axis)

    def _exact_dtype(self, bound: int) -> torch.dtype:
        assert bound < FLOAT64_EXACT  # 2^37 weights in one channel
        return torch.float32 if bound < FLOAT32_EXACT else torch.float64
