"""A packed model as a torch module that torch.export can capture: packed bytes as buffers.

What is captured is the code-domain reference itself, operator by operator: int64 products and
shifts, sums in float64 (exact whatever algorithm a machine has for its convolutions).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quant_ops.bit_widths import LEVELS, TERNARY, TRITS_PER_BYTE
from quant_ops.bitpack import pack_bits
from quant_ops.layout import from_canonical
from quant_ops.lowering import lower
from quant_ops.operators import implementation
from quant_ops.program import Call, Constant, Convolution, Input, IntegerProgram, Lookup, MatMul
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.requantize import Codes
from quant_ops.torch_machine import TorchMachine

_BITS_IN_BYTE = 8


class PackedProgram(nn.Module):
    """Runs the integer program of a reduced model from its packed codes."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        for number, layer in enumerate(model.graph.layers):
            quantized = model.layers.get(layer.name)
            for width in sorted(set(quantized.bit_widths) - {0}) if quantized else ():
                assert quantized is not None
                content = _stream(quantized, width)
                self.register_buffer(_name(number, width), torch.from_numpy(content))
        self._machine = _Capturable(lower(model), model, self)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs batch first; one output, or a tuple in the order of the graph."""
        outputs = self._machine.forward(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _Capturable(TorchMachine):
    """The reference without numpy between its operators."""

    def __init__(self, program: IntegerProgram, model: QuantizedModel, owner: nn.Module) -> None:
        super().__init__(program)
        self._model = model
        self._graph = model.graph
        self._buffer = owner.get_buffer

    def forward(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Flat outputs, float32 where they are codes."""
        self._inputs, self._values = inputs, {}
        for step in self._program.steps:
            self._values[step.out] = self._execute[type(step)](step)
        outputs = []
        for number in self._program.outputs:
            codes, value = self._program.codes[number], self._values[number]
            outputs.append(value if codes is None else self._dequantize(value, codes))
        self._values = {}
        return outputs

    def _input(self, step: Input) -> Any:
        x: Any = self._inputs[step.position]
        return x if step.codes is None else _quantize(x, step.codes)

    def _call(self, step: Call) -> Any:
        arguments = [self._argument(arg) for arg in step.args]
        layer = self._graph.layer_at.get(self._graph.index_of[step.name])
        if layer is not None and layer.name in self._model.layers:
            at = 0 if layer.kind == "embedding" else 1
            arguments[at] = self._float_weight(layer.name)
        value = implementation(step.op)(*arguments)
        if step.codes is None:
            return tuple(value) if isinstance(value, list | tuple) else value
        return _quantize(value, step.codes)

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Constant) and arg.array.flags.writeable is False:
            return torch.from_numpy(arg.array.copy())
        return super()._argument(arg)

    def _dequantize(self, value: Any, codes: Codes) -> Tensor:
        centered: Tensor = (value - codes.zero_point).float()
        return centered * torch.tensor(codes.scale)

    def _exact_dtype(self, bound: int) -> torch.dtype:
        super()._exact_dtype(bound)
        return torch.float64

    def _weights(self, step: Convolution | MatMul | Lookup) -> Tensor:
        layer = self._graph.layer_at[self._graph.index_of[step.name]]
        rows = self._integers(layer.name).reshape(step.weights.shape)
        if layer.kind == "conv_transpose":
            rows = rows.flip(tuple(range(2, rows.dim())))
        return rows

    def _float_weight(self, name: str) -> Tensor:
        """The float32 weight in the operator's own layout: one product, as the reference has it."""
        layer, quantized = self._graph.layer_of[name], self._model.layers[name]
        scales = quantized.channel_scales() * self._halves(quantized)
        rows = self._integers(name).float().reshape(*scales.shape, -1)
        values = rows * torch.from_numpy(scales)[:, :, None]
        return from_canonical(
            layer, values.reshape(layer.out_channels, -1, *layer.weight_shape[2:])
        )

    def _halves(self, quantized: QuantizedLayer) -> NDArray[np.float32]:
        half = np.isin(np.asarray(quantized.bit_widths), list(quantized.mid_rise))
        return np.where(half, 0.5, 1.0).astype(np.float32)[:, None]

    def _integers(self, name: str) -> Tensor:
        """int32 (out_channels, weights_per_channel): 2 code + 1 of mid-rise, else code - z."""
        quantized = self._model.layers[name]
        number = [layer.name for layer in self._graph.layers].index(name)
        widths = np.asarray(quantized.bit_widths)
        n_weights = quantized.codes.shape[1]
        parts, order = [], []
        for width in sorted(set(quantized.bit_widths)):
            rows = np.flatnonzero(widths == width)
            order.append(rows)
            if width == 0:
                parts.append(torch.zeros((len(rows), n_weights), dtype=torch.int32))
                continue
            stream = self._buffer(_name(number, width))
            codes = unpacked(stream, width, len(rows) * n_weights) + _lowest(quantized, width)
            codes = codes.reshape(len(rows), n_weights)
            if quantized.zero_points is not None:
                zeros = quantized.zero_points[rows].astype(np.int32)
                grouped = codes.reshape(*zeros.shape, -1) - torch.from_numpy(zeros)[:, :, None]
                codes = grouped.reshape(len(rows), n_weights)
            parts.append(2 * codes + 1 if width in quantized.mid_rise else codes)
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        back = np.argsort(np.concatenate(order))
        return joined if len(parts) == 1 else joined[torch.from_numpy(back)]


def unpacked(stream: Tensor, width: float, n_codes: int) -> Tensor:
    """The first `n_codes` codes of a stream of `pack_bits`, int32; whole units of bytes."""
    whole = stream.to(torch.int32)
    if width == _BITS_IN_BYTE:
        return whole[:n_codes]
    if width == TERNARY:
        powers = torch.tensor([3**i for i in range(TRITS_PER_BYTE)], dtype=torch.int32)
        return (whole[:, None] // powers % LEVELS[width]).reshape(-1)[:n_codes]
    bits = int(width)
    first = np.arange(_BITS_IN_BYTE) * bits
    low = torch.from_numpy(first // _BITS_IN_BYTE)
    high = torch.from_numpy(np.minimum(first // _BITS_IN_BYTE + 1, bits - 1))
    shift = torch.from_numpy((first % _BITS_IN_BYTE).astype(np.int32))
    units = whole.reshape(-1, bits)
    words = units[:, low] + 256 * units[:, high]
    codes: Tensor = (words >> shift) & (2**bits - 1)
    return codes.reshape(-1)[:n_codes]


def _stream(quantized: QuantizedLayer, width: float) -> NDArray[np.uint8]:
    rows = np.asarray(quantized.bit_widths) == width
    content = pack_bits(quantized.codes[rows] - _lowest(quantized, width), width)
    unit = 1 if width == TERNARY else int(width)
    return np.frombuffer(content + bytes(-len(content) % unit), np.uint8).copy()


def _lowest(quantized: QuantizedLayer, width: float) -> int:
    return 0 if quantized.zero_points is not None else -(LEVELS[width] // 2)


def _name(number: int, width: float) -> str:
    return f"layer{number}_bits{'1_6' if width == TERNARY else int(width)}"


def _quantize(x: Tensor, codes: Codes) -> Tensor:
    """Codes as float32 integers: one division, halves to even, saturated."""
    steps = (x.float() / torch.tensor(codes.scale)).round()
    low, high = codes.low - codes.zero_point, codes.high - codes.zero_point
    return steps.clamp(low, high) + codes.zero_point
