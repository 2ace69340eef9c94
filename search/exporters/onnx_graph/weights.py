"""Weights at their true width: initializers and the subgraph that widens them at load.

ONNX Runtime inlines local functions and folds what depends on initializers alone, so widening
happens once, when a session is created. Codes of 2, 4 and 8 bits are initializers of the
standard's own types; every other width is a stream of bytes, as FORMAT.md section 6 packs it, and
a local function that takes it apart.
"""

from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quant_ops.bit_widths import LEVELS, TERNARY, TRITS_PER_BYTE
from quant_ops.bitpack import pack_bits
from quant_ops.graph import Layer
from quant_ops.quantized import QuantizedLayer
from search.exporters.onnx_graph.builder import OPSET, OWN_DOMAIN, GraphBuilder

_STANDARD: dict[tuple[float, bool], int] = {
    (2, True): TensorProto.INT2, (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4, (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8, (8, False): TensorProto.UINT8,
}  # fmt: skip
_BITS_IN_BYTE = 8


def integer_rows(
    builder: GraphBuilder, layer: QuantizedLayer, factor: NDArray[np.int32] | None = None
) -> str:
    """int32 (out_channels, weights_per_channel): 2 code + 1 of mid-rise channels, else code - z.

    Args:
        builder: where nodes go.
        layer: one scale per channel.
        factor: for each channel what its integers are multiplied by.
    """
    parts = [
        (rows, _integers(builder, layer, width, rows, factor)) for width, rows in _groups(layer)
    ]
    return _in_order(builder, parts)


def float_rows(builder: GraphBuilder, layer: QuantizedLayer) -> str:
    """float32 (out_channels, weights_per_channel): what the codes stand for, one product each."""
    parts = []
    n_weights = layer.codes.shape[1]
    all_scales = layer.channel_scales()
    for width, rows in _groups(layer):
        whole = builder.cast(_integers(builder, layer, width, rows, None), "float32")
        scales = all_scales[rows] * np.float32(0.5 if width in layer.mid_rise else 1.0)
        if width == 0:
            parts.append((rows, whole))
            continue
        groups = scales.shape[1]
        if groups > 1:
            whole = builder.node("Reshape", [whole, builder.ints(len(rows), groups, -1)])
            scales = scales[:, :, None]
        whole = builder.node("Mul", [whole, builder.constant(scales)])
        if groups > 1:
            whole = builder.node("Reshape", [whole, builder.ints(len(rows), n_weights)])
        parts.append((rows, whole))
    return _in_order(builder, parts)


def in_layout(builder: GraphBuilder, layer: Layer, rows: str) -> str:
    """Canonical rows in the operator's own layout (a transposed convolution has another)."""
    if layer.kind != "conv_transpose":
        return builder.node("Reshape", [rows, builder.ints(*layer.weight_shape)])
    in_channels, per_group, *kernel = layer.weight_shape
    groups = layer.groups
    grouped = builder.ints(groups, per_group, in_channels // groups, *kernel)
    turned = builder.node(
        "Transpose",
        [builder.node("Reshape", [rows, grouped])],
        perm=[0, 2, 1, *range(3, 3 + len(kernel))],
    )
    return builder.node("Reshape", [turned, builder.ints(*layer.weight_shape)])


def _groups(layer: QuantizedLayer) -> list[tuple[float, NDArray[np.intp]]]:
    widths = np.asarray(layer.bit_widths)
    return [(float(w), np.flatnonzero(widths == w)) for w in sorted(set(layer.bit_widths))]


def _in_order(builder: GraphBuilder, parts: list[tuple[NDArray[np.intp], str]]) -> str:
    if len(parts) == 1:
        return parts[0][1]
    joined = builder.node("Concat", [name for _, name in parts], axis=0)
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    if np.array_equal(order, np.arange(len(order))):
        return joined
    small = order.astype(np.uint8 if len(order) <= 256 else np.int32)
    return builder.node("Gather", [joined, builder.cast(builder.constant(small), "int32")], axis=0)


def _integers(
    builder: GraphBuilder,
    layer: QuantizedLayer,
    width: float,
    rows: NDArray[np.intp],
    factor: NDArray[np.int32] | None,
) -> str:
    """int32 (rows, weights_per_channel) of the channels of one width."""
    n_weights = layer.codes.shape[1]
    if width == 0:
        zero = builder.constant(np.zeros((1, 1), np.int32))
        return builder.node("Expand", [zero, builder.ints(len(rows), n_weights)])
    affine = layer.zero_points is not None
    codes = layer.codes[rows]
    kind = _kind(width, affine)
    name, inputs = _stored(builder, codes, width, kind)
    whole = builder.call(_function(width, kind, width in layer.mid_rise), [name, *inputs])
    if layer.zero_points is not None:
        whole = _less_zero_points(builder, whole, layer.zero_points[rows], n_weights)
    if factor is None or (factor[rows] == 1).all():
        return whole
    by = builder.cast(builder.constant(factor[rows, None].astype(np.uint8)), "int32")
    return builder.node("Mul", [whole, by])


def _less_zero_points(
    builder: GraphBuilder, whole: str, zero_points: NDArray[np.int16], n_weights: int
) -> str:
    n_rows, groups = zero_points.shape
    stored = builder.cast(builder.constant(zero_points.astype(np.uint8)), "int32")
    if groups == 1:
        return builder.node("Sub", [whole, stored])
    shaped = builder.node("Reshape", [whole, builder.ints(n_rows, groups, -1)])
    column = builder.node("Reshape", [stored, builder.ints(n_rows, groups, 1)])
    less = builder.node("Sub", [shaped, column])
    return builder.node("Reshape", [less, builder.ints(n_rows, n_weights)])


def _kind(width: float, affine: bool) -> str:
    if (width, True) in _STANDARD:
        return "unsigned" if affine else "signed"
    return "bytes affine" if affine else "bytes"


def _stored(
    builder: GraphBuilder, codes: NDArray[np.int16], width: float, kind: str
) -> tuple[str, list[str]]:
    """The initializer of the codes, and what its function wants beside it."""
    if not kind.startswith("bytes"):
        mask = LEVELS[width] - 1
        content = pack_bits(codes & mask, width)
        return builder.raw(_STANDARD[width, kind == "signed"], codes.shape, content), []
    lowest = 0 if kind == "bytes affine" else -(LEVELS[width] // 2)
    content = pack_bits(codes - lowest, width)
    content += bytes(-len(content) % _unit(width)[0])
    stream = builder.constant(np.frombuffer(content, np.uint8))
    return stream, [builder.ints(*codes.shape)]


def _unit(width: float) -> tuple[int, int]:
    """(bytes, codes) of the shortest stretch of a stream that holds whole codes."""
    return (1, TRITS_PER_BYTE) if width == TERNARY else (int(width), _BITS_IN_BYTE)


@cache
def _function(width: float, kind: str, mid_rise: bool) -> onnx.FunctionProto:
    """codes (, shape) -> int32: 2 code + 1, or code; of an affine layer the code as stored."""
    name = f"{'Ternary' if width == TERNARY else f'Bits{width:g}'}{kind.title().replace(' ', '')}"
    name += "MidRise" if mid_rise else ""
    body = _Body()
    body.add("Cast", ["codes"], "whole", to=TensorProto.INT32)
    inputs, value, lowest = ["codes"], "whole", 0
    if kind.startswith("bytes"):
        inputs.append("shape")
        value = _taken_apart(body, width)
        lowest = 0 if kind == "bytes affine" else -(LEVELS[width] // 2)
    gain, shift = (2, 2 * lowest + 1) if mid_rise else (1, lowest)
    if gain != 1:
        value = body.add("Mul", [value, body.number(gain)], "doubled")
    value = body.add("Add", [value, body.number(shift)], "moved")
    body.add("Identity", [value], "integers")
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(OWN_DOMAIN, name, inputs, ["integers"], body.nodes, opset)


def _taken_apart(body: "_Body", width: float) -> str:
    n_bytes, n_codes = _unit(width)
    if width == TERNARY:
        low = high = np.zeros(n_codes, np.int64)
        divisor = 3 ** np.arange(n_codes)
    else:
        first = np.arange(n_codes) * n_bytes
        low, high = first // _BITS_IN_BYTE, np.minimum(first // _BITS_IN_BYTE + 1, n_bytes - 1)
        divisor = 2 ** (first % _BITS_IN_BYTE)
    body.add("Reshape", ["whole", body.array(np.array([-1, n_bytes], np.int64))], "units")
    body.add("Gather", ["units", body.array(low.astype(np.int64))], "low", axis=1)
    value = "low"
    if (low != high).any():
        body.add("Gather", ["units", body.array(high.astype(np.int64))], "high", axis=1)
        body.add("Mul", ["high", body.number(256)], "raised")
        value = body.add("Add", ["low", "raised"], "word")
    body.add("Div", [value, body.array(divisor.astype(np.int32))], "shifted")
    body.add("Mod", ["shifted", body.number(LEVELS[width])], "each")
    body.add("Reshape", ["each", body.array(np.array([-1], np.int64))], "flat")
    one = body.array(np.array([0], np.int64))
    body.add("ReduceProd", ["shape"], "count", keepdims=1)
    body.add("Slice", ["flat", one, "count"], "cut")
    return body.add("Reshape", ["cut", "shape"], "shaped")


class _Body:
    """Nodes of a local function; constants become nodes, since functions hold no initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def array(self, value: NDArray[Any]) -> str:
        name = f"k{len(self.nodes)}"
        return self.add("Constant", [], name, value=numpy_helper.from_array(value))

    def number(self, value: int) -> str:
        return self.array(np.array(value, np.int32))
