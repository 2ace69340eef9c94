"""The integer form of each operator that has one: a step with all its constants."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quant_ops.edges import Edge, activation_edges, edge_of, fused_clamp
from quant_ops.graph import Arg, Layer, Node, ParamRef, Ref, refs_in
from quant_ops.integer_weights import accumulator_bits, accumulator_bound, integer_weights
from quant_ops.operators import CONV, CONV_TRANSPOSE
from quant_ops.program import (
    Average,
    Combine,
    Concatenate,
    Convolution,
    Lookup,
    MatMul,
    Multiply,
    Step,
    WeightCodes,
)
from quant_ops.quantized import QuantizedModel
from quant_ops.requantize import Codes, Rescale, wide_codes
from quant_ops.windows import geometry_of, windows_of

Floats = NDArray[np.float64]


class NoIntegerForm(Exception):
    """This operator runs in float; the text says why."""


class LoweringState:
    """What is known of the values so far, and how a new one gets its meaning.

    `codes` holds, for each node index, the meaning of its integers (None: it has none).
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.graph = model.graph
        self.nodes = model.graph.nodes
        self.params = model.params()
        self.edges: dict[str, Edge] = {e.name: e for e in activation_edges(model.graph)}
        self.codes: list[Codes | None] = [None] * len(self.nodes)

    def quantizer(self, edge: str | None) -> Codes | None:
        quant = None if edge is None else self.model.activations.get(edge)
        if quant is None:
            return None
        return Codes(float(np.float32(quant.scale)), quant.zero_point, *quant.code_range)

    def source(self, arg: Arg) -> tuple[int, Codes]:
        """Number and meaning of a value that must hold codes."""
        if not isinstance(arg, Ref):
            raise NoIntegerForm("one of its operands is a parameter or a size")
        codes = self.codes[arg.index]
        if codes is None:
            raise NoIntegerForm(f"its input {self.nodes[arg.index].name} is not quantized")
        return arg.index, codes

    def destination(
        self, index: int, largest: float, limits: tuple[float, float] = (-np.inf, np.inf)
    ) -> tuple[int, Codes]:
        """The value number that a producer writes, and the codes it may take there.

        Args:
            index: the producing node.
            largest: proven limit of the result's magnitude; fixes the scale of an output.
            limits: what the producer itself clamps to; a fused clamp's bounds are added.
        """
        out = index
        clamp = fused_clamp(self.graph, index)
        if clamp is not None:
            out, limits = clamp, clamp_bounds(self.nodes[clamp])
        name = edge_of(self.graph, index)
        codes = self.quantizer(name)
        if codes is None:
            if name is None or self.edges[name].kind not in ("output", "partial"):
                raise NoIntegerForm("its result is not quantized")
            codes = wide_codes(largest)
        self.codes[out] = codes
        return out, clamped(codes, *limits)

    def finish(
        self,
        index: int,
        scales: Sequence[Floats],
        bounds: Sequence[float],
        constant: Floats,
        limits: tuple[float, float] = (-np.inf, np.inf),
    ) -> tuple[int, Rescale]:
        """The value number to write and its rescaling, a fused clamp included.

        Args:
            index: the producing node.
            scales: for each accumulator the value of one unit.
            bounds: for each accumulator its largest magnitude.
            constant: what is added, as a real number.
            limits: what the node itself clamps to.
        """
        largest = np.abs(constant) + sum(
            np.abs(scale) * bound for scale, bound in zip(scales, bounds, strict=True)
        )
        out, codes = self.destination(index, float(largest.max(initial=0.0)), limits)
        return out, rescale_to(codes, scales, bounds, constant)


def rescale_to(
    codes: Codes, scales: Sequence[Floats], bounds: Sequence[float], constant: Floats
) -> Rescale:
    """Rescaling of accumulators, whose units are `scales`, to codes."""
    return Rescale.fitted(
        [scale / codes.scale for scale in scales],
        [np.array(float(bound)) for bound in bounds],
        constant / codes.scale,
        codes,
    )


def clamp_bounds(node: Node) -> tuple[float, float]:
    """Smallest and largest value that a relu, relu6, hardtanh or clamp lets through."""
    kind = node.op.partition(".")[0]
    if kind in ("relu", "relu6"):
        return 0.0, 6.0 if kind == "relu6" else np.inf
    default = (-1.0, 1.0) if kind == "hardtanh" else (None, None)
    given = [*node.args[1:], *default[len(node.args) - 1 :]]
    low, high = (float(x) if isinstance(x, int | float) else None for x in given[:2])
    return -np.inf if low is None else low, np.inf if high is None else high


def clamped(codes: Codes, low: float, high: float) -> Codes:
    """The codes with their range narrowed to the nearest codes of two real bounds."""
    nearest = codes.quantize(np.array([low, high]))
    return Codes(codes.scale, codes.zero_point, int(nearest[0]), int(nearest[1]))


def _layer_at(state: LoweringState, index: int) -> tuple[Layer, WeightCodes, Floats, Floats]:
    """Layer, integers (out_channels, ...), their scales and the real biases (out_channels,)."""
    layer = state.graph.layer_at.get(index)
    quantized = state.model.layers.get(layer.name) if layer is not None else None
    if layer is None or quantized is None:
        raise NoIntegerForm("its weights stay float")
    if quantized.channel_scales().shape[1] > 1:
        raise NoIntegerForm("its weights have several scales per channel")
    weights, scales = integer_weights(quantized)
    bias = quantized.bias_values()
    constant = np.zeros(len(scales)) if bias is None else bias.double().numpy()
    return layer, weights, scales, constant


def _convolution(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    number, codes = state.source(node.args[0])
    layer, weights, scales, bias = _layer_at(state, index)
    rank = len(layer.weight_shape) - 2
    if len(node.shape) != rank + 2:
        raise NoIntegerForm("its input has no batch axis")
    kernel = layer.weight_shape[2:]
    weights = weights.reshape(layer.out_channels, -1, *kernel)
    bound = accumulator_bound(weights, codes)
    per_channel = (-1, *[1] * rank)
    out, rescale = state.finish(
        index,
        [(codes.scale * scales).reshape(per_channel)],
        [bound],
        bias.reshape(per_channel),
    )
    stride, padding, dilation, input_stride = geometry_of(node, kernel)
    if node.op in CONV_TRANSPOSE:
        weights = np.flip(weights, tuple(range(2, rank + 2)))
    return Convolution(
        out=out,
        name=node.name,
        sources=(number,),
        zero_points=(codes.zero_point,),
        weights=np.ascontiguousarray(weights),
        stride=stride,
        padding=padding,
        dilation=dilation,
        input_stride=input_stride,
        groups=layer.groups,
        bound=bound,
        accumulator_bits=accumulator_bits(bound),
        rescale=rescale,
    )


def _linear(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    number, codes = state.source(node.args[0])
    _, weights, scales, bias = _layer_at(state, index)
    bound = accumulator_bound(weights, codes)
    out, rescale = state.finish(index, [codes.scale * scales], [bound], bias)
    return MatMul(
        out=out,
        name=node.name,
        sources=(number,),
        zero_points=(codes.zero_point,),
        weights=weights,
        bound=bound,
        accumulator_bits=accumulator_bits(bound),
        rescale=rescale,
    )


def _embedding(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    _, weights, scales, _ = _layer_at(state, index)
    indices = node.args[1]
    if not isinstance(indices, Ref):
        raise NoIntegerForm("its indices are a parameter")
    bound = int(np.abs(weights.astype(np.int64)).max(initial=0))
    out, rescale = state.finish(index, [scales[:, None]], [bound], np.zeros((len(scales), 1)))
    return Lookup(
        out=out, name=node.name, sources=(indices.index,), weights=weights, rescale=rescale
    )


def _sum(
    state: LoweringState,
    index: int,
    terms: Sequence[tuple[Arg, float]],
    constant: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Step:
    """factor * value for each term, plus a constant."""
    node = state.nodes[index]
    numbers, scales, bounds, zero_points = [], [], [], []
    for arg, factor in terms:
        number, codes = state.source(arg)
        numbers.append(number)
        zero_points.append(codes.zero_point)
        scales.append(np.array(codes.scale * factor))
        bounds.append(codes.bound)
    out, rescale = state.finish(index, scales, bounds, np.array(constant), limits)
    return Combine(
        out=out,
        name=node.name,
        sources=tuple(numbers),
        zero_points=tuple(zero_points),
        rescale=rescale,
    )


def _add(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    alpha = _number(node.args[2]) if len(node.args) > 2 else 1.0
    sign = -alpha if node.op.startswith("sub") else alpha
    left, right = node.args[:2]
    if isinstance(right, int | float):
        return _sum(state, index, [(left, 1.0)], sign * right)
    if isinstance(left, int | float):
        return _sum(state, index, [(right, sign)], float(left))
    return _sum(state, index, [(left, 1.0), (right, sign)], 0.0)


def _reverse_sub(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    alpha = _number(node.args[2]) if len(node.args) > 2 else 1.0
    return _sum(state, index, [(node.args[0], -alpha)], _number(node.args[1]))


def _multiply(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    left, right = node.args[:2]
    if isinstance(right, int | float):
        return _sum(state, index, [(left, float(right))], 0.0)
    if isinstance(left, int | float):
        return _sum(state, index, [(right, float(left))], 0.0)
    (first, a), (second, b) = state.source(left), state.source(right)
    out, rescale = state.finish(
        index, [np.array(a.scale * b.scale)], [a.bound * b.bound], np.array(0.0)
    )
    return Multiply(
        out=out,
        name=node.name,
        sources=(first, second),
        zero_points=(a.zero_point, b.zero_point),
        rescale=rescale,
    )


def _divide(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    return _sum(state, index, [(node.args[0], 1.0 / _number(node.args[1]))], 0.0)


def _negate(state: LoweringState, index: int) -> Step:
    return _sum(state, index, [(state.nodes[index].args[0], -1.0)], 0.0)


def _number(arg: Arg) -> float:
    if not isinstance(arg, int | float) or (isinstance(arg, float) and not np.isfinite(arg)):
        raise NoIntegerForm("one of its operands is not a plain number")
    return float(arg)


def _clamp(state: LoweringState, index: int) -> Step:
    """A clamp with an edge of its own: rescaled to it, then limited."""
    node = state.nodes[index]
    if sum(1 for _ in refs_in(node.args)) > 1:
        raise NoIntegerForm("its bounds are computed")
    return _sum(state, index, [(node.args[0], 1.0)], 0.0, clamp_bounds(node))


def _affine(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    number, codes = state.source(node.args[0])
    gain, shift, axis = node.args[1:4]
    assert isinstance(gain, ParamRef)
    assert isinstance(shift, ParamRef)
    assert isinstance(axis, int)
    shape = [1] * len(node.shape)
    shape[axis] = -1
    gains = state.params[gain.name].double().numpy().reshape(shape[1:])
    shifts = state.params[shift.name].double().numpy().reshape(shape[1:])
    out, rescale = state.finish(index, [codes.scale * gains], [codes.bound], shifts)
    zero_points = (codes.zero_point,)
    return Combine(
        out=out, name=node.name, sources=(number,), zero_points=zero_points, rescale=rescale
    )


def _average(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    number, codes = state.source(node.args[0])
    windows = windows_of(node, state.nodes[number].shape)
    if windows is None:
        raise NoIntegerForm("it reduces over the batch")
    count = int(np.prod([(end - start).max() for start, end in windows.spans]))
    bound = count * codes.bound
    scale = codes.scale / windows.divisor
    out, rescale = state.finish(index, [scale], [bound], np.array(0.0))
    return Average(
        out=out,
        name=node.name,
        sources=(number,),
        zero_points=(codes.zero_point,),
        axes=windows.axes,
        windows=windows.spans,
        keep_axes=windows.keep_axes,
        bound=bound,
        rescale=rescale,
    )


def _concatenate(state: LoweringState, index: int) -> Step:
    node = state.nodes[index]
    parts = node.args[0]
    assert isinstance(parts, tuple)
    sources = [state.source(part) for part in parts]
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(axis, int)
    largest = max(codes.scale * codes.bound for _, codes in sources)
    out, result = state.destination(index, largest)
    rescales = [
        rescale_to(result, [np.array(codes.scale)], [codes.bound], np.array(0.0))
        for _, codes in sources
    ]
    return Concatenate(
        out=out,
        name=node.name,
        sources=tuple(number for number, _ in sources),
        zero_points=tuple(codes.zero_point for _, codes in sources),
        axis=axis % len(node.shape),
        rescales=tuple(rescales),
    )


INTEGER_FORMS: Mapping[str, Callable[[LoweringState, int], Step]] = {
    **dict.fromkeys(CONV | CONV_TRANSPOSE, _convolution),
    "linear.default": _linear,
    "embedding.default": _embedding,
    **dict.fromkeys(("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar"), _add),
    "rsub.Scalar": _reverse_sub,
    **dict.fromkeys(("mul.Tensor", "mul.Scalar"), _multiply),
    **dict.fromkeys(("div.Tensor", "div.Scalar"), _divide),
    "neg.default": _negate,
    **dict.fromkeys(
        ("relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default"), _clamp
    ),
    "bitfront.channel_affine": _affine,
    **dict.fromkeys(
        (
            "mean.dim", "sum.dim_IntList", "avg_pool1d.default", "avg_pool2d.default",
            "avg_pool3d.default", "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default",
            "adaptive_avg_pool3d.default",
        ),
        _average,
    ),
    "cat.default": _concatenate,
}  # fmt: skip
