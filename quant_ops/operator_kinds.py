"""What operators do to zeros and to the order of channels."""

import numpy as np

from quant_ops.graph import Arg, Node
from quant_ops.operators import OPERATORS
from quant_ops.slots import Ids

# One tensor, position by position, 0 to 0.
ZERO_KEEPING = frozenset({
    "relu.default", "relu6.default", "leaky_relu.default", "elu.default", "gelu.default",
    "silu.default", "tanh.default", "hardswish.default", "sqrt.default", "abs.default",
    "neg.default", "sin.default", "erf.default", "floor.default", "round.default", "sign.default",
    "selu.default", "celu.default", "log1p.default", "hardshrink.default", "softshrink.default",
    "square.default", "mul.Scalar", "div.Scalar", "_to_copy.default", "to.dtype", "mish.default",
})  # fmt: skip
# One tensor, position by position, 0 to something else.
POINTWISE = frozenset({
    "sigmoid.default", "hardsigmoid.default", "softplus.default", "exp.default", "cos.default",
    "add.Scalar", "sub.Scalar", "rsub.Scalar", "hardtanh.default", "clamp.default",
    "clamp_min.default", "threshold.default",
})  # fmt: skip
SIZES = frozenset(op for op in OPERATORS if op.startswith(("size.", "sym_size.")))
SUMS = frozenset({"add.Tensor", "sub.Tensor", "maximum.default", "minimum.default"})
MOVES = frozenset({
    "reshape.default", "permute.default", "transpose.int", "t.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "expand.default", "repeat.default", "cat.default", "stack.default", "split.Tensor",
    "split_with_sizes.default", "chunk.default", "unbind.int", "slice.Tensor", "select.int",
    "flip.default", "roll.default", "pixel_unshuffle.default", "channel_shuffle.default",
    "movedim.int",
})  # fmt: skip
ONE_BY_ONE = frozenset({"select.int", "unbind.int", "squeeze.dim", "squeeze.dims"})
PADS = frozenset({
    "pad.default", "constant_pad_nd.default", "reflection_pad1d.default",
    "reflection_pad2d.default", "replication_pad1d.default", "replication_pad2d.default",
})  # fmt: skip
# Act on the last axes, whose number the name carries, each channel by itself.
POOLS = frozenset(
    op for op in OPERATORS if op.startswith(("avg_p", "max_p", "adaptive_", "upsample_"))
)
REDUCTIONS = frozenset({"mean.dim", "sum.dim_IntList", "amax.default", "amin.default"})
# Operators that act along one axis only, with the position of that argument and its default.
ALONG_ONE_AXIS = {
    "cat.default": (1, 0), "slice.Tensor": (1, 0), "split.Tensor": (2, 0),
    "split_with_sizes.default": (2, 0), "chunk.default": (2, 0),
}  # fmt: skip


def keeps_zero(node: Node) -> bool:
    """Whether a clipping operator's bounds include 0."""
    if node.op in ("hardtanh.default", "clamp.default", "clamp_min.default"):
        bounds = (*node.args[1:3], None, None)
        low, high = bounds[0], bounds[1]
        if node.op == "hardtanh.default":
            low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
        return all(b is None or isinstance(b, int | float) for b in (low, high)) and (
            (low is None or low <= 0) and (high is None or high >= 0)  # type: ignore[operator]
        )
    return False


def compressed(ids: Ids) -> Ids:
    """The smallest array that broadcasts to `ids`."""
    for axis in range(ids.ndim):
        head = ids.take([0], axis)
        if ids.shape[axis] > 1 and bool((ids == head).all()):
            ids = head
    return np.ascontiguousarray(ids)


def pad_pairs(amounts: tuple[Arg, ...], rank: int) -> list[tuple[int, int]]:
    """(before, after) for each axis of a value; torch lists the pairs from the last axis on."""
    numbers = [n for n in amounts if isinstance(n, int)]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]
