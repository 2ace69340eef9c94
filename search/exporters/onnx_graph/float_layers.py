"""Layers that compute in float: weights are widened at load, or read in blocks by MatMulNBits."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from quant_ops.graph import Layer
from quant_ops.operators import CONV, CONV_TRANSPOSE
from quant_ops.program import Call, StepArg
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.windows import geometry_of
from search.exporters.onnx_graph.builder import GraphBuilder
from search.exporters.onnx_graph.state import WriterState, argument, array_of, ints_of
from search.exporters.onnx_graph.weights import float_rows, in_layout, integer_rows

# Below this many weights the call costs more than it saves (measured: none at 256 x 256).
MIN_BLOCKED_WEIGHTS = 2**18
BLOCK_SIZES = (128, 64, 32)
ACCURACY_INT8 = 4  # activations are rounded to 8 bits block by block: the fast kernels


def put_linear(state: WriterState, step: Call, x: str) -> str:
    """MatMulNBits where it runs fast, else a product with the widened weights."""
    builder = state.builder
    layer, quantized = _layer(state, step)
    bias = argument(step.args, 2)
    block = None if quantized is None else _block_size(quantized)
    if quantized is not None and block is not None:
        total = _in_blocks(builder, quantized, block, x)
    else:
        weight = _weight(state, step, layer, quantized)
        total = builder.node("MatMul", [x, builder.node("Transpose", [weight], perm=[1, 0])])
    return total if bias is None else builder.node("Add", [total, _bias(state, layer, bias)])


def put_convolution(state: WriterState, step: Call, x: str) -> str:
    """A float convolution with the widened weights."""
    layer, quantized = _layer(state, step)
    stride, padding, dilation, _ = geometry_of(state.node_of(step), layer.weight_shape[2:])
    inputs = [x, _weight(state, step, layer, quantized)]
    bias = argument(step.args, 2)
    if bias is not None:
        inputs.append(_bias(state, layer, bias))
    return state.builder.node(
        "Conv", inputs, strides=stride, dilations=dilation, group=layer.groups,
        pads=[before for before, _ in padding] + [after for _, after in padding],
    )  # fmt: skip


def put_transposed(state: WriterState, step: Call, x: str) -> str:
    """A float transposed convolution."""
    layer, quantized = _layer(state, step)
    rank = len(layer.weight_shape) - 2

    def numbers(position: int, default: int) -> list[int]:
        given = ints_of(argument(step.args, position, default))
        return given * rank if len(given) == 1 else given

    padding = numbers(4, 0)
    inputs = [x, _weight(state, step, layer, quantized)]
    bias = argument(step.args, 2)
    if bias is not None:
        inputs.append(_bias(state, layer, bias))
    return state.builder.node(
        "ConvTranspose", inputs, strides=numbers(3, 1), pads=[*padding, *padding],
        output_padding=numbers(5, 0), dilations=numbers(7, 1), group=layer.groups,
    )  # fmt: skip


def put_embedding(state: WriterState, step: Call, table: str) -> str:
    """Rows of the widened table; `table` is not used, the layer names its own."""
    layer, quantized = _layer(state, step)
    indices = step.sources[-1]
    weight = _weight(state, step, layer, quantized)
    return state.builder.node("Gather", [weight, state.value(indices)], axis=0)


def _layer(state: WriterState, step: Call) -> tuple[Layer, QuantizedLayer | None]:
    layer = state.graph.layer_at[state.graph.index_of[step.name]]
    return layer, state.model.layers.get(layer.name)


def _weight(state: WriterState, step: Call, layer: Layer, quantized: QuantizedLayer | None) -> str:
    """The float weight in the operator's own layout."""
    if quantized is None:
        position = 0 if layer.kind == "embedding" else 1
        return state.builder.constant(array_of(step.args[position]))
    return in_layout(state.builder, layer, float_rows(state.builder, quantized))


def _bias(state: WriterState, layer: Layer, bias: StepArg) -> str:
    return state.builder.constant(array_of(bias))


def runs_in_blocks(model: QuantizedModel) -> bool:
    """Whether some layer of a network with float activations runs as MatMulNBits."""
    return any(
        layer.kind == "linear" and _block_size(model.layers[layer.name]) is not None
        for layer in model.graph.layers
        if layer.name in model.layers
    )


def _block_size(layer: QuantizedLayer) -> int | None:
    """Weights that share a scale in MatMulNBits; None where another form is better."""
    n_out, n_in = layer.codes.shape
    several = layer.channel_scales().shape[1] > 1
    if layer.zero_points is not None or several or n_out * n_in < MIN_BLOCKED_WEIGHTS:
        return None
    return next((size for size in BLOCK_SIZES if n_in % size == 0), None)


def _in_blocks(builder: GraphBuilder, layer: QuantizedLayer, block: int, x: str) -> str:
    """x W^T by MatMulNBits; codes of mid-rise channels lie half a step beside its levels."""
    n_out, n_in = layer.codes.shape
    bits = _container(max(layer.bit_widths))
    shape = builder.ints(n_out, n_in // block, block * bits // 8)
    codes = builder.node("Reshape", [_stored_blocks(builder, layer, bits), shape])
    scales = layer.channel_scales()
    spread = builder.node("Expand", [builder.constant(scales), builder.ints(n_out, n_in // block)])
    flat = builder.node("Reshape", [spread, builder.ints(-1)])
    total = builder.runtime_node(
        "MatMulNBits", [x, codes, flat], K=n_in, N=n_out, bits=bits, block_size=block,
        accuracy_level=ACCURACY_INT8,
    )  # fmt: skip
    half = np.isin(np.asarray(layer.bit_widths), list(layer.mid_rise))
    if not half.any():
        return total
    steps = np.where(half, scales[:, 0] / 2, 0).astype(np.float32)
    sums = builder.node("ReduceSum", [x, builder.ints(-1)], keepdims=1)
    return builder.node("Add", [total, builder.node("Mul", [sums, builder.constant(steps)])])


def _container(bit_width: float) -> int:
    """Bits of MatMulNBits that hold codes of a width."""
    return next(bits for bits in (2, 4, 8) if bit_width <= bits)


def _stored_blocks(builder: GraphBuilder, layer: QuantizedLayer, bits: int) -> str:
    """uint8 codes above the container's lowest, lowest bits first, as FORMAT.md packs them.

    One width that fills its container is stored as it is; others are widened at load.
    """
    widths = set(layer.bit_widths)
    lowest = -(2 ** (bits - 1))
    if widths == {bits}:
        return builder.constant(_packed_bytes(layer.codes - lowest, bits))
    plain = QuantizedLayer(
        layer.bit_widths, layer.codes, layer.scales, frozenset(), None, layer.bias
    )
    whole = integer_rows(builder, plain)
    whole = builder.node("Add", [whole, builder.constant(np.int32(-lowest))])
    per_byte = 8 // bits
    if per_byte > 1:
        grouped = builder.node("Reshape", [whole, builder.ints(len(layer.codes), -1, per_byte)])
        weights = builder.constant((2 ** (bits * np.arange(per_byte))).astype(np.int32))
        placed = builder.node("Mul", [grouped, weights])
        whole = builder.node("ReduceSum", [placed, builder.ints(2)], keepdims=0)
    return builder.cast(whole, "uint8")


def _packed_bytes(codes: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    grouped = codes.astype(np.uint8).reshape(len(codes), -1, per_byte)
    shifts = (bits * np.arange(per_byte)).astype(np.uint8)
    packed: NDArray[np.uint8] = (grouped << shifts).sum(2).astype(np.uint8)
    return packed


FLOAT_LAYERS: Mapping[str, Callable[[WriterState, Call, str], str]] = {
    "linear.default": put_linear,
    "embedding.default": put_embedding,
    **dict.fromkeys(CONV, put_convolution),
    **dict.fromkeys(CONV_TRANSPOSE, put_transposed),
}
