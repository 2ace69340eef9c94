"""Float operators that take several ONNX ones: reductions, pools, norms, attention, products."""

import math

import numpy as np

from quant_ops.graph import Ref
from quant_ops.program import Constant, StepArg
from search.exporters.onnx_graph.builder import Unsupported
from search.exporters.onnx_graph.float_call import FloatCall, Put
from search.exporters.onnx_graph.state import Value, argument, int_of, ints_of


def reduce(op: str) -> Put:
    def put(call: FloatCall) -> Value:
        given = argument(call.args, 1)
        if given is None:
            raise Unsupported("it reduces over the batch", "name the axes")
        axes = [a % len(call.shape()) for a in ints_of(given)]
        keep = int(bool(argument(call.args, 2, False)))
        return call.put(op, call.tensor(0), call.b.ints(*axes), keepdims=keep)

    return put


def variance(call: FloatCall) -> Value:
    axes = [a % len(call.shape()) for a in ints_of(argument(call.args, 1, ()))]
    correction = call.number(2, 1.0)
    keep = int(bool(argument(call.args, 3, False)))
    names, x = call.b.ints(*axes), call.tensor(0)
    mean = call.put("ReduceMean", x, names, keepdims=1)
    distance = call.put("Sub", x, mean)
    square = call.put("ReduceSum", call.put("Mul", distance, distance), names, keepdims=keep)
    count = math.prod(call.shape()[a] for a in axes) - correction
    return call.put("Div", square, call.scalar(count))


def average_pool(call: FloatCall) -> Value:
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


def adaptive_average(call: FloatCall) -> Value:
    rank = len(call.out_shape) - 2
    sizes, wanted = call.shape()[-rank:], call.out_shape[-rank:]
    if all(n == 1 for n in wanted):
        axes = call.b.ints(*range(2, 2 + rank))
        return call.put("ReduceMean", call.tensor(0), axes, keepdims=1)
    if any(n % m for n, m in zip(sizes, wanted, strict=True)):
        raise Unsupported("windows of several sizes have no operator", "pool to a divisor")
    kernel = [n // m for n, m in zip(sizes, wanted, strict=True)]
    return call.put("AveragePool", call.tensor(0), kernel_shape=kernel, strides=kernel)


def layer_norm(call: FloatCall) -> str:
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


def native_layer_norm(call: FloatCall) -> Value:
    return [layer_norm(call), "", ""]


def rms_norm(call: FloatCall) -> Value:
    normalized = ints_of(call.args[1])
    scale = call.tensor(2) if argument(call.args, 2) is not None else call.b.constant(
        np.ones(normalized, np.float32)
    )  # fmt: skip
    axis = len(call.shape()) - len(normalized)
    epsilon = call.number(3, float(np.finfo(np.float32).eps))
    return call.put("RMSNormalization", call.tensor(0), scale, axis=axis, epsilon=epsilon)


def group_norm(call: FloatCall) -> Value:
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


def batch_norm(call: FloatCall) -> str:
    names = [call.tensor(i) for i in range(5)]
    return call.put("BatchNormalization", *names, epsilon=call.number(7, 1e-5))


def softmax(op: str) -> Put:
    return lambda call: call.put(op, call.tensor(0), axis=call.axis(1))


def attention(call: FloatCall) -> Value:
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


def addmm(call: FloatCall) -> Value:
    if call.number(3, 1.0) != 1 or call.number(4, 1.0) != 1:
        raise Unsupported("its factors are not 1", "multiply beside it")
    return call.put("Add", call.put("MatMul", call.tensor(1), call.tensor(2)), call.tensor(0))


def einsum(call: FloatCall) -> Value:
    operands = call.args[1]
    assert isinstance(operands, tuple)
    names = [call.value(operand) for operand in operands]
    return call.put("Einsum", *names, equation=str(call.args[0]).replace(" ", ""))


def joined(call: FloatCall) -> Value:
    operands = call.args[0]
    assert isinstance(operands, tuple)
    names = [call.value(operand) for operand in operands]
    axis = int_of(argument(call.args, 1, 0)) % len(call.out_shape)
    if call.step.op == "stack.default":
        names = [call.put("Unsqueeze", name, call.b.ints(axis)) for name in names]
    return call.put("Concat", *names, axis=axis)
