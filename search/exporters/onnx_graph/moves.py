"""Operators that move, drop or compare values, on codes and on floats alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quant_ops.graph import Ref, Shape
from quant_ops.operator_kinds import pad_pairs
from quant_ops.program import StepArg
from search.exporters.onnx_graph.builder import GraphBuilder, Unsupported
from search.exporters.onnx_graph.state import (
    Value,
    WriterState,
    argument,
    array_of,
    int_of,
    ints_of,
)

_END = 2**63 - 1


@dataclass(frozen=True)
class Moved:
    """One call: what is moved, its shape for a batch of one, the arguments, what stands for 0."""

    state: WriterState
    x: str
    shape: Shape
    out_shape: Shape
    args: Sequence[StepArg]
    fill: str
    is_codes: bool

    @property
    def b(self) -> GraphBuilder:
        """Where nodes go."""
        return self.state.builder

    def axis(self, position: int, default: StepArg = None) -> int:
        """The axis in an argument, counted from the front."""
        return int_of(argument(self.args, position, default)) % len(self.shape)

    def reshaped(self, x: str, *sizes: int) -> str:
        """0 keeps a dimension."""
        return self.b.node("Reshape", [x, self.b.ints(*sizes)])


def _reshape(m: Moved) -> Value:
    return m.b.node("Reshape", [m.x, m.state.shape_argument(m.args[1])])


def _flatten(m: Moved) -> Value:
    start, end = (int_of(argument(m.args, i, d)) % len(m.shape) for i, d in ((1, 0), (2, -1)))
    if start == 0:
        raise Unsupported("it merges the batch with other axes", "flatten from axis 1 on")
    return m.reshaped(m.x, *[0] * start, -1, *m.shape[end + 1 :])


def _unflatten(m: Moved) -> Value:
    axis = m.axis(1)
    return m.reshaped(m.x, *[0] * axis, *ints_of(m.args[2]), *m.shape[axis + 1 :])


def _permute(m: Moved) -> Value:
    return m.b.node("Transpose", [m.x], perm=[a % len(m.shape) for a in ints_of(m.args[1])])


def _transpose(m: Moved) -> Value:
    order = list(range(len(m.shape)))
    first, second = (m.axis(1), m.axis(2)) if len(m.args) > 2 else (0, 1)
    order[first], order[second] = order[second], order[first]
    return m.b.node("Transpose", [m.x], perm=order)


def _movedim(m: Moved) -> Value:
    source, target = m.axis(1), m.axis(2)
    order = [a for a in range(len(m.shape)) if a != source]
    order.insert(target, source)
    return m.b.node("Transpose", [m.x], perm=order)


def _unsqueeze(m: Moved) -> Value:
    axis = int_of(m.args[1]) % (len(m.shape) + 1)
    return m.b.node("Unsqueeze", [m.x, m.b.ints(axis)])


def _squeeze(m: Moved) -> Value:
    wanted = range(1, len(m.shape)) if len(m.args) < 2 else ints_of(m.args[1])
    axes = [a % len(m.shape) for a in wanted]
    axes = [a for a in axes if m.shape[a] == 1 and a > 0]
    return m.b.node("Squeeze", [m.x, m.b.ints(*axes)]) if axes else m.x


def _expand(m: Moved) -> Value:
    sizes = m.args[1]
    assert isinstance(sizes, tuple)
    parts: list[str] = []
    for size in sizes:
        if isinstance(size, Ref):
            parts.append(m.state.value(size.index))
        else:
            parts.append(m.b.ints(max(int_of(size), 1)))
    return m.b.node("Expand", [m.x, m.b.node("Concat", parts, axis=0)])


def _expand_as(m: Moved) -> Value:
    other = m.args[1]
    assert isinstance(other, Ref)
    return m.b.node("Expand", [m.x, m.b.node("Shape", [m.state.value(other.index)])])


def _repeat(m: Moved) -> Value:
    times = ints_of(m.args[1])
    x = m.x
    for _ in range(len(times) - len(m.shape)):
        x = m.b.node("Unsqueeze", [x, m.b.ints(0)])
    return m.b.node("Tile", [x, m.b.ints(*times)])


def _slice(m: Moved) -> Value:
    ends = [argument(m.args, 2), argument(m.args, 3), argument(m.args, 4, 1)]
    names = []
    for end, default in zip(ends, (0, _END, 1), strict=True):
        if isinstance(end, Ref):
            names.append(m.state.value(end.index))
        else:
            names.append(m.b.ints(default if end is None else int_of(end)))
    return m.b.node("Slice", [m.x, *names[:2], m.b.ints(m.axis(1, 0)), names[2]])


def _select(m: Moved) -> Value:
    index = m.b.constant(np.array(int_of(m.args[2]), np.int64))
    return m.b.node("Gather", [m.x, index], axis=m.axis(1))


def _index_select(m: Moved) -> Value:
    return m.b.node("Gather", [m.x, _index(m, m.args[2])], axis=m.axis(1))


def _gather(m: Moved) -> Value:
    return m.b.node("GatherElements", [m.x, _index(m, m.args[2])], axis=m.axis(1))


def _indexed(m: Moved) -> Value:
    indices = m.args[1]
    assert isinstance(indices, tuple)
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise Unsupported("it indexes several axes at once", "index one axis after the other")
    axis, index = given[0]
    return m.b.node("Gather", [m.x, _index(m, index)], axis=axis)


def _index(m: Moved, index: StepArg) -> str:
    if isinstance(index, Ref):
        return m.state.value(index.index)
    return m.b.constant(array_of(index).astype(np.int64))


def _flip(m: Moved) -> Value:
    axes = [a % len(m.shape) for a in ints_of(m.args[1])]
    back = m.b.ints(*[-1] * len(axes))
    ends = m.b.ints(*[-_END] * len(axes))
    return m.b.node("Slice", [m.x, back, ends, m.b.ints(*axes), back])


def _roll(m: Moved) -> Value:
    x, axes = m.x, argument(m.args, 2, ())
    shifts = ints_of(m.args[1])
    if axes in ((), None):
        raise Unsupported("it rolls over all axes at once", "name the axes")
    for shift, axis in zip(shifts, ints_of(axes), strict=True):
        at = -shift % m.shape[axis]
        if at:
            names = [m.b.ints(n) for n in (at, _END, axis % len(m.shape), 0)]
            tail = m.b.node("Slice", [x, names[0], names[1], names[2]])
            head = m.b.node("Slice", [x, names[3], names[0], names[2]])
            x = m.b.node("Concat", [tail, head], axis=axis % len(m.shape))
    return x


def _pad(m: Moved) -> Value:
    amounts = m.args[1]
    assert isinstance(amounts, tuple)
    mode, value = "constant", argument(m.args, 2)
    if isinstance(value, str):
        mode, value = value, argument(m.args, 3)
    return _padded(m, mode, amounts, value)


def _pad_mode(mode: str) -> Callable[[Moved], Value]:
    def put(m: Moved) -> Value:
        amounts = m.args[1]
        assert isinstance(amounts, tuple)
        return _padded(m, mode, amounts, None)

    return put


def _padded(m: Moved, mode: str, amounts: tuple[StepArg, ...], value: StepArg) -> str:
    pairs = pad_pairs(tuple(ints_of(amounts)), len(m.shape))
    pads = m.b.ints(*(before for before, _ in pairs), *(after for _, after in pairs))
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise Unsupported(
            f"padding mode {mode!r} is not known", "use constant, reflect or replicate"
        )
    fill = [m.fill] if mode == "constant" else []
    if mode == "constant" and isinstance(value, int | float) and value != 0:
        fill = [m.b.constant(np.float32(value))]
    return m.b.node("Pad", [m.x, pads, *fill], mode=names[mode])


def _gather_channels(m: Moved) -> Value:
    axis, index = m.axis(1), np.array(ints_of(m.args[2]), np.int64)
    x = m.x
    if (index < 0).any():
        ends = [0] * (2 * len(m.shape))
        ends[len(m.shape) + axis] = 1
        x = m.b.node("Pad", [x, m.b.ints(*ends), m.fill])
        index = np.where(index < 0, m.shape[axis], index)
    return m.b.node("Gather", [x, m.b.constant(index)], axis=axis)


def _split(m: Moved) -> Value:
    axis = m.axis(2, 0)
    sizes = ints_of(m.args[1])
    if not isinstance(m.args[1], tuple):
        whole, rest = divmod(m.shape[axis], sizes[0])
        sizes = [sizes[0]] * whole + [rest] * bool(rest)
    return m.b.nodes_out("Split", [m.x, m.b.ints(*sizes)], len(sizes), axis=axis)


def _chunk(m: Moved) -> Value:
    axis = m.axis(2, 0)
    size = -(-m.shape[axis] // int_of(m.args[1]))
    whole, rest = divmod(m.shape[axis], size)
    sizes = [size] * whole + [rest] * bool(rest)
    return m.b.nodes_out("Split", [m.x, m.b.ints(*sizes)], len(sizes), axis=axis)


def _unbind(m: Moved) -> Value:
    axis = m.axis(1, 0)
    n = m.shape[axis]
    parts = m.b.nodes_out("Split", [m.x, m.b.ints(*[1] * n)], n, axis=axis)
    return [m.b.node("Squeeze", [part, m.b.ints(axis)]) for part in parts]


def _max_pool(m: Moved) -> Value:
    rank = len(m.out_shape) - 2
    kernel, stride, padding, dilation = (
        _per_axis(argument(m.args, i, d), rank) for i, d in ((1, 1), (2, ()), (3, 0), (4, 1))
    )
    stride = stride or kernel
    sizes = m.shape[2:]
    needed = [
        (out - 1) * s + d * (k - 1) + 1 - n - p
        for out, s, d, k, n, p in zip(
            m.out_shape[2:], stride, dilation, kernel, sizes, padding, strict=True
        )
    ]
    return m.b.node(
        "MaxPool", [m.x], kernel_shape=kernel, strides=stride, dilations=dilation,
        pads=[*padding, *(max(n, 0) for n in needed)],
    )  # fmt: skip


def _max_pool_with_indices(m: Moved) -> Value:
    pooled = _max_pool(m)
    assert isinstance(pooled, str)
    return [pooled, ""]


def _per_axis(arg: StepArg, rank: int) -> list[int]:
    numbers = ints_of(arg)
    return numbers * rank if len(numbers) == 1 else numbers


def _adaptive_max(m: Moved) -> Value:
    rank = len(m.shape) - 2
    if any(n != 1 for n in m.out_shape[-rank:]):
        raise Unsupported("windows of several sizes have no operator", "pool to one position")
    axes = m.b.ints(*range(2, len(m.shape)))
    return [m.b.node("ReduceMax", [m.x, axes], keepdims=1), ""]


def _extreme(op: str) -> Callable[[Moved], Value]:
    def put(m: Moved) -> Value:
        axes = [a % len(m.shape) for a in ints_of(argument(m.args, 1, ()))]
        if not axes:
            raise Unsupported("it reduces over the batch", "name the axes")
        keep = int(bool(argument(m.args, 2, False)))
        return m.b.node(op, [m.x, m.b.ints(*axes)], keepdims=keep)

    return put


def _extreme_pair(op: str) -> Callable[[Moved], Value]:
    put = _extreme(op)

    def pair(m: Moved) -> Value:
        value = put(m)
        assert isinstance(value, str)
        return [value, ""]

    return pair


def _upsample(m: Moved) -> Value:
    scales = [out / n for out, n in zip(m.out_shape[2:], m.shape[2:], strict=True)]
    if any(scale != int(scale) for scale in scales):
        raise Unsupported("it enlarges by a fraction", "enlarge by a whole number")
    factors = m.b.constant(np.array([1, 1, *scales], np.float32))
    return m.b.node(
        "Resize", [m.x, "", factors], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _pixel_shuffle(m: Moved) -> Value:
    r, (_, c, h, w) = int_of(m.args[1]), m.shape
    apart = m.reshaped(m.x, 0, c // r**2, r, r, h, w)
    turned = m.b.node("Transpose", [apart], perm=[0, 1, 4, 2, 5, 3])
    return m.reshaped(turned, 0, c // r**2, h * r, w * r)


def _pixel_unshuffle(m: Moved) -> Value:
    r, (_, c, h, w) = int_of(m.args[1]), m.shape
    apart = m.reshaped(m.x, 0, c, h // r, r, w // r, r)
    turned = m.b.node("Transpose", [apart], perm=[0, 1, 3, 5, 2, 4])
    return m.reshaped(turned, 0, c * r**2, h // r, w // r)


def _channel_shuffle(m: Moved) -> Value:
    groups, channels = int_of(m.args[1]), m.shape[1]
    apart = m.reshaped(m.x, 0, groups, channels // groups, *m.shape[2:])
    turned = m.b.node("Transpose", [apart], perm=[0, 2, 1, *range(3, len(m.shape) + 1)])
    return m.reshaped(turned, 0, *m.shape[1:])


def _relu(m: Moved) -> Value:
    return m.b.node("Clip", [m.x, m.fill]) if m.is_codes else m.b.node("Relu", [m.x])


MOVES: Mapping[str, Callable[[Moved], Value]] = {
    "relu.default": _relu,
    "reshape.default": _reshape,
    "flatten.using_ints": _flatten,
    "unflatten.int": _unflatten,
    "permute.default": _permute,
    "transpose.int": _transpose,
    "t.default": _transpose,
    "movedim.int": _movedim,
    "unsqueeze.default": _unsqueeze,
    **dict.fromkeys(("squeeze.default", "squeeze.dim", "squeeze.dims"), _squeeze),
    "expand.default": _expand,
    "expand_as.default": _expand_as,
    "repeat.default": _repeat,
    "slice.Tensor": _slice,
    "select.int": _select,
    "index_select.default": _index_select,
    "gather.default": _gather,
    "index.Tensor": _indexed,
    "flip.default": _flip,
    "roll.default": _roll,
    "pad.default": _pad,
    "constant_pad_nd.default": _pad,
    "reflection_pad1d.default": _pad_mode("reflect"),
    "reflection_pad2d.default": _pad_mode("reflect"),
    "replication_pad1d.default": _pad_mode("replicate"),
    "replication_pad2d.default": _pad_mode("replicate"),
    "bitfront.gather_channels": _gather_channels,
    "split.Tensor": _split,
    "split_with_sizes.default": _split,
    "chunk.default": _chunk,
    "unbind.int": _unbind,
    **dict.fromkeys(("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"), _max_pool),
    "max_pool2d_with_indices.default": _max_pool_with_indices,
    "max_pool3d_with_indices.default": _max_pool_with_indices,
    "adaptive_max_pool1d.default": _adaptive_max,
    "adaptive_max_pool2d.default": _adaptive_max,
    "amax.default": _extreme("ReduceMax"),
    "amin.default": _extreme("ReduceMin"),
    "max.dim": _extreme_pair("ReduceMax"),
    "min.dim": _extreme_pair("ReduceMin"),
    **dict.fromkeys(
        ("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec"), _upsample
    ),
    "pixel_shuffle.default": _pixel_shuffle,
    "pixel_unshuffle.default": _pixel_unshuffle,
    "channel_shuffle.default": _channel_shuffle,
}
