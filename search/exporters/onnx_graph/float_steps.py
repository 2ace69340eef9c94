"""Operators without an integer form, and networks whose weights alone are quantized."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quant_ops.graph import Ref
from quant_ops.program import Call, Constant, StepArg
from search.exporters.onnx_graph.builder import ELEMENT_TYPES, Unsupported
from search.exporters.onnx_graph.float_layers import FLOAT_LAYERS
from search.exporters.onnx_graph.moves import MOVES, Moved
from search.exporters.onnx_graph.state import Value, WriterState, argument, int_of, ints_of


class FloatCall:
    """One call: its arguments as names of values."""

    def __init__(self, state: WriterState, step: Call) -> None:
        self.state = state
        self.step = step
        self.b = state.builder
        self.args = step.args
        self.out_shape = state.graph.nodes[step.out].shape

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Shape of an argument for a batch of one."""
        arg = self.args[position]
        if isinstance(arg, Ref):
            return self.state.graph.nodes[arg.index].shape
        return arg.array.shape if isinstance(arg, Constant) else ()

    def tensor(self, position: int, default: StepArg = None) -> str:
        """An argument as a value; a plain number as float32, or int64 beside whole numbers."""
        arg = argument(self.args, position, default)
        if isinstance(arg, Ref):
            return self.state.dequantized(arg.index) if self._has_codes(arg) else self._plain(arg)
        if isinstance(arg, Constant):
            return self.b.constant(arg.array)
        if isinstance(arg, bool | int | float):
            return self.b.constant(np.array(arg, self._dtype()))
        raise Unsupported("one of its arguments is neither a tensor nor a number", "rewrite it")

    def _plain(self, arg: Ref) -> str:
        return self.state.value(arg.index)

    def _has_codes(self, arg: Ref) -> bool:
        return self.state.program.codes[arg.index] is not None

    def _dtype(self) -> Any:
        for arg in self.args:
            if isinstance(arg, Ref):
                dtype = self.state.graph.nodes[arg.index].dtype
                return np.dtype(dtype or "int64")
        return np.dtype("float32")

    def number(self, position: int, default: float) -> float:
        """A plain number among the arguments."""
        arg = argument(self.args, position, default)
        if isinstance(arg, int | float):
            return float(arg)
        raise Unsupported("one of its settings is computed while it runs", "fix it in the model")

    def axis(self, position: int) -> int:
        """An axis, counted from the front."""
        return int_of(self.args[position]) % len(self.shape())

    def put(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One operator."""
        return self.b.node(op, inputs, **attributes)

    def scalar(self, value: float) -> str:
        """A float32 constant."""
        return self.b.constant(np.float32(value))


Put = Callable[[FloatCall], Value]


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
        fill = call.b.constant(np.zeros((), call._dtype()))
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
            other = call.put("Mul", other, call.b.constant(np.array(factor, call._dtype())))
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
    if argument(call.args, 2) == "floor" and np.dtype(call._dtype()).kind == "f":
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


def _reduce(op: str) -> Put:
    def put(call: FloatCall) -> Value:
        given = argument(call.args, 1)
        if given is None:
            raise Unsupported("it reduces over the batch", "name the axes")
        axes = [a % len(call.shape()) for a in ints_of(given)]
        keep = int(bool(argument(call.args, 2, False)))
        return call.put(op, call.tensor(0), call.b.ints(*axes), keepdims=keep)

    return put


def _variance(call: FloatCall) -> Value:
    axes = [a % len(call.shape()) for a in ints_of(argument(call.args, 1, ()))]
    correction = call.number(2, 1.0)
    keep = int(bool(argument(call.args, 3, False)))
    names, x = call.b.ints(*axes), call.tensor(0)
    mean = call.put("ReduceMean", x, names, keepdims=1)
    distance = call.put("Sub", x, mean)
    square = call.put("ReduceSum", call.put("Mul", distance, distance), names, keepdims=keep)
    count = math.prod(call.shape()[a] for a in axes) - correction
    return call.put("Div", square, call.scalar(count))


def _average_pool(call: FloatCall) -> Value:
    rank = len(call.out_shape) - 2

    def numbers(position: int, default: StepArg) -> list[int]:
        given = ints_of(argument(call.args, position, default))
        return given * rank if len(given) == 1 else given

    kernel, padding = numbers(1, 1), numbers(3, 0)
    if argument(call.args, 4, False) or argument(call.args, 6) is not None:
        raise Unsupported("windows past the end, or a divisor of its own", "use plain windows")
    return call.put(
        "AveragePool", call.tensor(0), kernel_shape=kernel, strides=numbers(2, ()) or kernel,
        pads=[*padding, *padding], count_include_pad=int(bool(argument(call.args, 5, True))),
    )  # fmt: skip


def _adaptive_average(call: FloatCall) -> Value:
    rank = len(call.out_shape) - 2
    sizes, wanted = call.shape()[-rank:], call.out_shape[-rank:]
    if all(n == 1 for n in wanted):
        axes = call.b.ints(*range(2, 2 + rank))
        return call.put("ReduceMean", call.tensor(0), axes, keepdims=1)
    if any(n % m for n, m in zip(sizes, wanted, strict=True)):
        raise Unsupported("windows of several sizes have no operator", "pool to a divisor")
    kernel = [n // m for n, m in zip(sizes, wanted, strict=True)]
    return call.put("AveragePool", call.tensor(0), kernel_shape=kernel, strides=kernel)


def _layer_norm(call: FloatCall) -> str:
    normalized = ints_of(call.args[1])
    axis = len(call.shape()) - len(normalized)
    weight = argument(call.args, 2)
    scale = call.tensor(2) if weight is not None else call.b.constant(
        np.ones(normalized, np.float32)
    )  # fmt: skip
    inputs = [call.tensor(0), scale]
    if argument(call.args, 3) is not None:
        inputs.append(call.tensor(3))
    epsilon = call.number(4, 1e-5)
    return call.put("LayerNormalization", *inputs, axis=axis, epsilon=epsilon)


def _native_layer_norm(call: FloatCall) -> Value:
    return [_layer_norm(call), "", ""]


def _rms_norm(call: FloatCall) -> Value:
    normalized = ints_of(call.args[1])
    scale = call.tensor(2) if argument(call.args, 2) is not None else call.b.constant(
        np.ones(normalized, np.float32)
    )  # fmt: skip
    axis = len(call.shape()) - len(normalized)
    epsilon = call.number(3, float(np.finfo(np.float32).eps))
    return call.put("RMSNormalization", call.tensor(0), scale, axis=axis, epsilon=epsilon)


def _group_norm(call: FloatCall) -> Value:
    channels = call.shape()[1]
    groups = int_of(call.args[1])
    x = call.put("Reshape", call.tensor(0), call.b.ints(0, groups, -1))
    ones, zeros = (call.b.constant(np.full(groups, v, np.float32)) for v in (1, 0))
    epsilon = call.number(4, 1e-5)
    x = call.put("InstanceNormalization", x, ones, zeros, epsilon=epsilon)
    x = call.put("Reshape", x, call.b.ints(-1, *call.shape()[1:]))
    for position, op in ((2, "Mul"), (3, "Add")):
        param = argument(call.args, position)
        if isinstance(param, Constant):
            shape = (channels, *[1] * (len(call.shape()) - 2))
            x = call.put(op, x, call.b.constant(param.array.reshape(shape)))
    return x


def _batch_norm(call: FloatCall) -> str:
    names = [call.tensor(i) for i in range(5)]
    return call.put("BatchNormalization", *names, epsilon=call.number(7, 1e-5))


def _softmax(op: str) -> Put:
    return lambda call: call.put(op, call.tensor(0), axis=call.axis(1))


def _attention(call: FloatCall) -> Value:
    q, k, v = (call.tensor(i) for i in range(3))
    length, size = call.shape(0)[-2:]
    rank = len(call.shape(0))
    scale = argument(call.args, 6)
    factor = float(scale) if isinstance(scale, int | float) else 1 / math.sqrt(size)
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = call.put("MatMul", q, call.b.node("Transpose", [k], perm=order))
    scores = call.put("Mul", scores, call.scalar(factor))
    if argument(call.args, 5, False):
        n_keys = call.shape(1)[-2]
        mask = np.where(np.tril(np.ones((length, n_keys), bool)), 0, -np.inf)
        scores = call.put("Add", scores, call.b.constant(mask.astype(np.float32)))
    if argument(call.args, 3) is not None:
        arg = call.args[3]
        number = arg.index if isinstance(arg, Ref) else -1
        is_bool = (
            call.state.graph.nodes[number].dtype == "bool"
            if number >= 0
            else isinstance(arg, Constant) and arg.array.dtype == np.bool_
        )
        mask_name = call.tensor(3)
        if is_bool:
            mask_name = call.put("Where", mask_name, call.scalar(0), call.scalar(-np.inf))
        scores = call.put("Add", scores, mask_name)
    return call.put("MatMul", call.put("Softmax", scores, axis=rank - 1), v)


def _addmm(call: FloatCall) -> Value:
    if call.number(3, 1.0) != 1 or call.number(4, 1.0) != 1:
        raise Unsupported("its factors are not 1", "multiply beside it")
    return call.put("Add", call.put("MatMul", call.tensor(1), call.tensor(2)), call.tensor(0))


def _einsum(call: FloatCall) -> Value:
    operands = call.args[1]
    assert isinstance(operands, tuple)
    names = [_operand(call, operand) for operand in operands]
    return call.put("Einsum", *names, equation=str(call.args[0]).replace(" ", ""))


def _operand(call: FloatCall, operand: StepArg) -> str:
    if isinstance(operand, Ref):
        return call.state.dequantized(operand.index) if call._has_codes(operand) else (
            call.state.value(operand.index)
        )  # fmt: skip
    if isinstance(operand, Constant):
        return call.b.constant(operand.array)
    raise Unsupported("one of its operands is no tensor", "rewrite it")


def _joined(call: FloatCall) -> Value:
    operands = call.args[0]
    assert isinstance(operands, tuple)
    names = [_operand(call, operand) for operand in operands]
    axis = int_of(argument(call.args, 1, 0)) % len(call.out_shape)
    if call.step.op == "stack.default":
        names = [call.put("Unsqueeze", name, call.b.ints(axis)) for name in names]
    return call.put("Concat", *names, axis=axis)


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
    "mean.dim": _reduce("ReduceMean"),
    "sum.dim_IntList": _reduce("ReduceSum"),
    "logsumexp.default": _reduce("ReduceLogSumExp"),
    "var.correction": _variance,
    **dict.fromkeys(
        ("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default"), _average_pool
    ),
    **dict.fromkeys(
        (
            "adaptive_avg_pool1d.default",
            "adaptive_avg_pool2d.default",
            "adaptive_avg_pool3d.default",
        ),
        _adaptive_average,
    ),
    "layer_norm.default": _layer_norm,
    "native_layer_norm.default": _native_layer_norm,
    "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm,
    "batch_norm.default": _batch_norm,
    **dict.fromkeys(("softmax.int", "_softmax.default"), _softmax("Softmax")),
    **dict.fromkeys(("log_softmax.int", "_log_softmax.default"), _softmax("LogSoftmax")),
    "scaled_dot_product_attention.default": _attention,
    "addmm.default": _addmm,
    "einsum.default": _einsum,
    **dict.fromkeys(("cat.default", "stack.default"), _joined),
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
