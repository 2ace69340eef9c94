"""Operators without an integer form, and networks whose weights alone are quantized."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quant_ops.graph import Ref
from quant_ops.program import Call, Constant
from search.exporters.onnx_graph.builder import ELEMENT_TYPES, Unsupported
from search.exporters.onnx_graph.float_blocks import (
    adaptive_average,
    addmm,
    attention,
    average_pool,
    batch_norm,
    einsum,
    group_norm,
    joined,
    layer_norm,
    native_layer_norm,
    reduce,
    rms_norm,
    softmax,
    variance,
)
from search.exporters.onnx_graph.float_call import FloatCall, Put
from search.exporters.onnx_graph.float_layers import FLOAT_LAYERS
from search.exporters.onnx_graph.moves import MOVES, Moved
from search.exporters.onnx_graph.state import Value, WriterState, argument, int_of


def put_call(state: WriterState, step: Call) -> Value:
    """A float operator; its result is quantized where its edge is."""
    value = _value(state, step)
    if step.codes is None:
        return value
    assert isinstance(value, str)
    return state.quantized(value, step.codes)


def _value(state: WriterState, step: Call) -> Value:
    call = FloatCall(state, step)
    if step.op == "getitem":
        return picked(state, step.sources[0], int_of(step.args[1]))
    if step.op in FLOAT_LAYERS:
        x = "" if step.op.startswith("embedding") else call.tensor(0)
        return FLOAT_LAYERS[step.op](state, step, x)
    if step.op in FLOAT_STEPS:
        return FLOAT_STEPS[step.op](call)
    if step.op in MOVES:
        fill = call.b.constant(np.zeros((), call.dtype()))
        moved = Moved(state, call.tensor(0), call.shape(), call.out_shape, step.args, fill, False)
        return MOVES[step.op](moved)
    raise Unsupported(
        f"operator {step.op} has no ONNX form here",
        "replace it in the model, or export to packed or torch",
    )


def picked(state: WriterState, source: int, position: int) -> str:
    """One of several results."""
    values = state.values[source]
    name = values[position] if isinstance(values, list) else ""
    if not name:
        raise Unsupported("it reads positions, which are not computed", "use the values alone")
    return name


def _unary(op: str, **attributes: Any) -> Put:
    return lambda call: call.put(op, call.tensor(0), **attributes)


def _with(op: str, name: str, default: float) -> Put:
    return lambda call: call.put(op, call.tensor(0), **{name: call.number(1, default)})


def _binary(op: str) -> Put:
    return lambda call: call.put(op, call.tensor(0), call.tensor(1))


def _scaled_sum(op: str) -> Put:
    def put(call: FloatCall) -> Value:
        factor = argument(call.args, 2, 1)
        other = call.tensor(1)
        if factor != 1:
            other = call.put("Mul", other, call.b.constant(np.array(factor, call.dtype())))
        return call.put(op, call.tensor(0), other)

    return put


def _reverse_sub(call: FloatCall) -> Value:
    x = call.tensor(0)
    factor = call.number(2, 1.0)
    if factor != 1:
        x = call.put("Mul", x, call.scalar(factor))
    return call.put("Sub", call.tensor(1), x)


def _divide_mode(call: FloatCall) -> Value:
    ratio = call.put("Div", call.tensor(0), call.tensor(1))
    if argument(call.args, 2) == "floor" and np.dtype(call.dtype()).kind == "f":
        return call.put("Floor", ratio)
    raise Unsupported("its rounding mode has no operator", "use floor on floats")


def _clip(low: float | None, high: float | None) -> Put:
    def put(call: FloatCall) -> Value:
        ends = [argument(call.args, 1, low), argument(call.args, 2, high)]
        if any(isinstance(end, Ref | Constant) for end in ends):
            raise Unsupported("its bounds are tensors", "clamp to plain numbers")
        names = ["" if end is None else call.scalar(float(end)) for end in ends]  # type: ignore[arg-type]
        return call.put("Clip", call.tensor(0), *names)

    return put


def _relu6(call: FloatCall) -> Value:
    return call.put("Clip", call.tensor(0), call.scalar(0), call.scalar(6))


def _silu(call: FloatCall) -> Value:
    x = call.tensor(0)
    return call.put("Mul", x, call.put("Sigmoid", x))


def _gelu(call: FloatCall) -> Value:
    mode = argument(call.args, 1, "none")
    return call.put("Gelu", call.tensor(0), approximate=str(mode))


def _prelu(call: FloatCall) -> Value:
    slope = call.args[1]
    if not isinstance(slope, Constant):
        raise Unsupported("its slope is computed", "keep it a parameter")
    shape = (-1, *[1] * (len(call.shape()) - 2))
    return call.put("PRelu", call.tensor(0), call.b.constant(slope.array.reshape(shape)))


def _square(call: FloatCall) -> Value:
    x = call.tensor(0)
    return call.put("Mul", x, x)


def _rsqrt(call: FloatCall) -> Value:
    return call.put("Reciprocal", call.put("Sqrt", call.tensor(0)))


def _log1p(call: FloatCall) -> Value:
    return call.put("Log", call.put("Add", call.tensor(0), call.scalar(1)))


def _not_equal(call: FloatCall) -> Value:
    return call.put("Not", call.put("Equal", call.tensor(0), call.tensor(1)))


def _affine(call: FloatCall) -> Value:
    shape = [1] * len(call.out_shape)
    shape[int_of(call.args[3])] = -1
    x = call.tensor(0)
    for position, op in ((1, "Mul"), (2, "Add")):
        param = call.args[position]
        assert isinstance(param, Constant)
        x = call.put(op, x, call.b.constant(param.array.reshape(shape[1:])))
    return x


def _size(call: FloatCall) -> Value:
    axis = int_of(call.args[1]) % len(call.shape())
    arg = call.args[0]
    assert isinstance(arg, Ref)
    source = call.state.value(arg.index)
    return call.put("Shape", source, start=axis, end=axis + 1)


def _size_math(op: str) -> Put:
    def put(call: FloatCall) -> Value:
        names = [
            call.state.value(a.index) if isinstance(a, Ref) else call.b.ints(int_of(a))
            for a in call.args
        ]
        return call.put(op, *names)

    return put


def _param(call: FloatCall) -> Value:
    return call.tensor(0)


def _filled(value: float | None) -> Put:
    def put(call: FloatCall) -> Value:
        content = call.number(1, 0.0) if value is None else value
        dtype = np.dtype(call.state.graph.nodes[call.step.out].dtype)
        one = call.b.constant(np.array(content, dtype))
        sizes = call.args[0]
        assert isinstance(sizes, tuple)
        parts = [
            call.state.value(s.index) if isinstance(s, Ref) else call.b.ints(int_of(s))
            for s in sizes
        ]
        return call.put("Expand", one, call.put("Concat", *parts, axis=0))

    return put


def _filled_like(value: float) -> Put:
    def put(call: FloatCall) -> Value:
        dtype = np.dtype(call.state.graph.nodes[call.step.out].dtype)
        one = call.b.constant(np.array(value, dtype))
        return call.put("Expand", one, call.put("Shape", call.tensor(0)))

    return put


def _arange(call: FloatCall) -> Value:
    numbers = [int_of(a) for a in call.args if isinstance(a, int) and not isinstance(a, bool)]
    if not numbers or any(isinstance(a, Ref) for a in call.args):
        raise Unsupported("its length is computed while it runs", "fix it in the model")
    dtype = np.dtype(call.state.graph.nodes[call.step.out].dtype)
    return call.b.constant(np.arange(*numbers).astype(dtype))


def _converted(call: FloatCall) -> Value:
    dtype = call.state.graph.nodes[call.step.out].dtype
    if dtype not in ELEMENT_TYPES:
        raise Unsupported(f"type {dtype} is not written", "convert to float32")
    return call.b.cast(call.tensor(0), dtype)


def _masked_fill(call: FloatCall) -> Value:
    return call.put("Where", call.tensor(1), call.scalar(call.number(2, 0.0)), call.tensor(0))


def _where(call: FloatCall) -> Value:
    return call.put("Where", *(call.tensor(i) for i in range(3)))


_UNARY = {
    "leaky_relu.default": _with("LeakyRelu", "alpha", 0.01),
    "elu.default": _with("Elu", "alpha", 1.0), "celu.default": _with("Celu", "alpha", 1.0),
    "sigmoid.default": _unary("Sigmoid"), "tanh.default": _unary("Tanh"),
    "hardswish.default": _unary("HardSwish"), "selu.default": _unary("Selu"),
    "hardsigmoid.default": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "softplus.default": _unary("Softplus"), "mish.default": _unary("Mish"),
    "exp.default": _unary("Exp"), "log.default": _unary("Log"), "sqrt.default": _unary("Sqrt"),
    "abs.default": _unary("Abs"), "neg.default": _unary("Neg"), "erf.default": _unary("Erf"),
    "reciprocal.default": _unary("Reciprocal"), "sin.default": _unary("Sin"),
    "cos.default": _unary("Cos"), "floor.default": _unary("Floor"),
    "round.default": _unary("Round"), "sign.default": _unary("Sign"),
    "logical_not.default": _unary("Not"),
}  # fmt: skip
_BINARY = {
    **dict.fromkeys(("mul.Tensor", "mul.Scalar"), _binary("Mul")),
    **dict.fromkeys(("div.Tensor", "div.Scalar"), _binary("Div")),
    "maximum.default": _binary("Max"), "minimum.default": _binary("Min"),
    **dict.fromkeys(("eq.Tensor", "eq.Scalar"), _binary("Equal")),
    **dict.fromkeys(("lt.Tensor", "lt.Scalar"), _binary("Less")),
    **dict.fromkeys(("le.Tensor", "le.Scalar"), _binary("LessOrEqual")),
    **dict.fromkeys(("gt.Tensor", "gt.Scalar"), _binary("Greater")),
    **dict.fromkeys(("ge.Tensor", "ge.Scalar"), _binary("GreaterOrEqual")),
    **dict.fromkeys(("ne.Tensor", "ne.Scalar"), _not_equal),
    "logical_and.default": _binary("And"), "logical_or.default": _binary("Or"),
    **dict.fromkeys(("bmm.default", "matmul.default", "mm.default"), _binary("MatMul")),
    "pow.Tensor_Scalar": _binary("Pow"), "pow.Tensor_Tensor": _binary("Pow"),
}  # fmt: skip
FLOAT_STEPS: Mapping[str, Put] = {
    **_UNARY,
    **_BINARY,
    **dict.fromkeys(("add.Tensor", "add.Scalar"), _scaled_sum("Add")),
    **dict.fromkeys(("sub.Tensor", "sub.Scalar"), _scaled_sum("Sub")),
    "rsub.Scalar": _reverse_sub,
    "div.Tensor_mode": _divide_mode,
    "relu6.default": _relu6,
    "hardtanh.default": _clip(-1.0, 1.0),
    "clamp.default": _clip(None, None),
    "clamp_min.default": _clip(None, None),
    "silu.default": _silu,
    "gelu.default": _gelu,
    "prelu.default": _prelu,
    "square.default": _square,
    "rsqrt.default": _rsqrt,
    "log1p.default": _log1p,
    "mean.dim": reduce("ReduceMean"),
    "sum.dim_IntList": reduce("ReduceSum"),
    "logsumexp.default": reduce("ReduceLogSumExp"),
    "var.correction": variance,
    **dict.fromkeys(
        ("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default"), average_pool
    ),
    **dict.fromkeys(
        (
            "adaptive_avg_pool1d.default",
            "adaptive_avg_pool2d.default",
            "adaptive_avg_pool3d.default",
        ),
        adaptive_average,
    ),
    "layer_norm.default": layer_norm,
    "native_layer_norm.default": native_layer_norm,
    "rms_norm.default": rms_norm,
    "group_norm.default": group_norm,
    "batch_norm.default": batch_norm,
    **dict.fromkeys(("softmax.int", "softmax.default"), softmax("Softmax")),
    **dict.fromkeys(("log_softmax.int", "_log_softmax.default"), softmax("LogSoftmax")),
    "scaled_dot_product_attention.default": attention,
    "addmm.default": addmm,
    "einsum.default": einsum,
    **dict.fromkeys(("cat.default", "stack.default"), joined),
    "bitfront.channel_affine": _affine,
    "sym_size.int": _size,
    "size.add": _size_math("Add"),
    "size.sub": _size_math("Sub"),
    "size.mul": _size_math("Mul"),
    "size.floordiv": _size_math("Div"),
    "size.neg": _size_math("Neg"),
    "size.mod": _size_math("Mod"),
    "param": _param,
    "zeros.default": _filled(0.0),
    "ones.default": _filled(1.0),
    "full.default": _filled(None),
    "zeros_like.default": _filled_like(0.0),
    "ones_like.default": _filled_like(1.0),
    **dict.fromkeys(("arange.default", "arange.start", "arange.start_step"), _arange),
    **dict.fromkeys(("_to_copy.default", "to.dtype"), _converted),
    "masked_fill.Scalar": _masked_fill,
    "where.self": _where,
}
