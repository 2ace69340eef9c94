"""The closed list of operators that a graph may hold.

Names are ATen overloads, plus a few of our own ("size.*" on integers, "bitfront.*"). A packed
file stores an operator as its position in `OPERATORS`: append only, never reorder. Nothing
outside this list is ever executed from a file.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant_ops.errors import VerificationError

OPERATORS: tuple[str, ...] = (
    "input",
    # layers
    "conv1d.default", "conv2d.default", "conv3d.default",
    "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
    "linear.default", "embedding.default",
    # ours
    "bitfront.channel_affine", "bitfront.gather_channels", "getitem", "sym_size.int",
    "size.add", "size.sub", "size.mul", "size.floordiv", "size.neg", "size.mod",
    # elementwise, one tensor
    "relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default",
    "leaky_relu.default", "prelu.default", "elu.default", "gelu.default", "silu.default",
    "sigmoid.default", "tanh.default", "hardswish.default", "hardsigmoid.default",
    "softplus.default", "mish.default", "exp.default", "log.default", "sqrt.default",
    "rsqrt.default", "abs.default", "neg.default", "reciprocal.default", "sin.default",
    "cos.default", "erf.default", "floor.default", "round.default", "sign.default",
    "pow.Tensor_Scalar", "pow.Scalar", "pow.Tensor_Tensor", "selu.default", "celu.default",
    "threshold.default", "logical_not.default", "bitwise_not.default", "log1p.default",
    "hardshrink.default", "softshrink.default", "square.default",
    # elementwise, two tensors
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor",
    "mul.Scalar", "div.Tensor", "div.Scalar", "div.Tensor_mode", "maximum.default",
    "minimum.default", "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor",
    "lt.Scalar", "le.Tensor", "le.Scalar", "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar",
    "where.self", "where.ScalarOther", "where.ScalarSelf", "logical_and.default",
    "logical_or.default", "bitwise_and.Tensor", "bitwise_or.Tensor", "masked_fill.Scalar",
    "lerp.Scalar", "remainder.Scalar", "floor_divide.default",
    # shape
    "reshape.default", "permute.default", "transpose.int", "t.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims",
    "expand.default", "repeat.default", "cat.default", "stack.default", "split.Tensor",
    "split_with_sizes.default", "chunk.default", "unbind.int", "slice.Tensor", "select.int",
    "index_select.default", "gather.default", "pad.default", "constant_pad_nd.default",
    "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
    "replication_pad2d.default", "flip.default", "roll.default", "pixel_shuffle.default",
    "pixel_unshuffle.default", "channel_shuffle.default", "unfold.default", "movedim.int",
    "expand_as.default", "view_as.default", "index.Tensor", "tril.default", "triu.default",
    # reductions and pooling
    "mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default",
    "max.dim", "min.dim", "argmax.default", "prod.dim_int", "var.correction", "std.correction",
    "var_mean.correction", "cumsum.default", "logsumexp.default", "topk.default",
    "norm.ScalarOpt_dim", "linalg_vector_norm.default", "avg_pool1d.default", "avg_pool2d.default",
    "avg_pool3d.default", "max_pool1d.default", "max_pool2d.default", "max_pool3d.default",
    "max_pool2d_with_indices.default", "max_pool3d_with_indices.default",
    "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default",
    "adaptive_max_pool1d.default", "adaptive_max_pool2d.default",
    # normalisation, attention, recurrence
    "batch_norm.default", "_native_batch_norm_legit_no_training.default", "layer_norm.default",
    "native_layer_norm.default", "group_norm.default", "native_group_norm.default",
    "instance_norm.default", "rms_norm.default", "softmax.int", "_softmax.default",
    "log_softmax.int", "_log_softmax.default", "scaled_dot_product_attention.default",
    "bmm.default", "matmul.default", "mm.default", "addmm.default", "baddbmm.default",
    "einsum.default", "bilinear.default", "lstm.input", "gru.input", "rnn_tanh.input",
    "rnn_relu.input",
    # creation and resampling
    "zeros.default", "ones.default", "full.default", "zeros_like.default", "ones_like.default",
    "full_like.default", "arange.default", "arange.start", "arange.start_step",
    "new_zeros.default", "new_ones.default", "new_full.default", "scalar_tensor.default",
    "_to_copy.default", "to.dtype", "type_as.default", "upsample_nearest1d.vec",
    "upsample_nearest2d.vec", "upsample_nearest3d.vec", "upsample_bilinear2d.vec",
    "upsample_bicubic2d.vec", "upsample_trilinear3d.vec", "grid_sampler.default", "param",
    "conv1d.padding", "conv2d.padding", "conv3d.padding",
)  # fmt: skip

OPCODES: dict[str, int] = {name: code for code, name in enumerate(OPERATORS)}
CONV = frozenset(
    name for name in OPERATORS if name.startswith("conv") and not name.startswith("conv_transpose")
)
CONV_TRANSPOSE = frozenset(name for name in OPERATORS if name.startswith("conv_transpose"))
LINEAR = frozenset({"linear.default"})
EMBEDDING = frozenset({"embedding.default"})
LAYER_OPS = CONV | CONV_TRANSPOSE | LINEAR | EMBEDDING


def _channel_affine(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


def _gather_channels(x: Tensor, axis: int, index: list[int]) -> Tensor:
    """Channels of `x` by number along `axis`; -1 stands for a channel of zeros."""
    positions = torch.tensor(index, device=x.device)
    picked = x.index_select(axis, positions.clamp_min(0))
    if min(index, default=0) >= 0:
        return picked
    shape = [1] * x.dim()
    shape[axis] = -1
    return picked * (positions >= 0).to(x.dtype).reshape(shape)


_OWN: dict[str, Callable[..., Any]] = {
    "bitfront.channel_affine": _channel_affine,
    "bitfront.gather_channels": _gather_channels,
    "getitem": operator.getitem,
    "size.add": operator.add,
    "size.sub": operator.sub,
    "size.mul": operator.mul,
    "size.floordiv": operator.floordiv,
    "size.neg": operator.neg,
    "size.mod": operator.mod,
    "param": lambda tensor: tensor,
}


@cache
def overload_of(op: str) -> torch._ops.OpOverload | None:
    """The ATen overload called `op`, or None for one of our own operators."""
    if op in _OWN or op == "input":
        return None
    packet, _, overload = op.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
    return found


@cache
def implementation(op: str) -> Callable[..., Any]:
    """A function of positional arguments that computes the operator.

    Raises:
        VerificationError: `op` is not on the closed list.
    """
    if op not in OPCODES:
        raise VerificationError(f"operator {op!r} is not one that a graph may hold")
    if op in _OWN:
        return _OWN[op]
    overload = overload_of(op)
    assert overload is not None
    names = [a.name for a in overload._schema.arguments]
    n_positional = sum(not a.kwarg_only for a in overload._schema.arguments)
    if n_positional == len(names):
        return overload

    def call(*args: object) -> object:
        return overload(
            *args[:n_positional],
            **dict(zip(names[n_positional:], args[n_positional:], strict=False)),
        )

    return call
