"""ONNX models with the right kernels and shapes and made-up weights: for timing, not for use.

A whole network is built from the same calls that a table predicts it by.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cost_models.latency.lowering import output_names
from cost_models.latency.work import Call, Work
from quant_ops.errors import UsageError
from quant_ops.graph import Graph, refs_in
from quant_ops.operator_kinds import pad_pairs

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
SCALE, MIDDLE = 0.05, 128
HELPER = "helper"  # begins the names of values that a probe needs beside what it times
_UNARY = {"relu.default": "Relu", "sigmoid.default": "Sigmoid", "tanh.default": "Tanh"}


def weight_kernel_bits(kernel: str) -> int:
    """Weight width of a weight-only kernel called "weightN", else 0."""
    return int(kernel.removeprefix("weight")) if kernel.startswith("weight") else 0


def block_size(in_features: int) -> int:
    """Weights that share a scale in MatMulNBits: 128, as fast as any, or what the layer has."""
    return min(128, max(16, 1 << (in_features - 1).bit_length()))


@dataclass
class _Model:
    """Nodes and constants in the making; `sizes` holds the shape of every value."""

    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    coded: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, array: NDArray[np.generic] | np.generic, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        domain = MICROSOFT if op.startswith("QLinearAdd") or op in _CONTRIBUTED else ""
        self.nodes.append(helper.make_node(op, list(inputs), [output], domain=domain, **attributes))
        return output

    def scale(self) -> str:
        return self.constant(np.array(SCALE, np.float32).reshape(()), "scale")

    def zero(self, *, relu: bool) -> str:
        value = 0 if relu else MIDDLE
        return self.constant(np.array(value, np.uint8), f"zero{value}")

    def qparams(self, *, relu: bool = False) -> list[str]:
        return [self.scale(), self.zero(relu=relu)]

    def floats(self, *shape: int) -> NDArray[np.float32]:
        fan_in = max(1, int(np.prod(shape[1:])))
        return self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))

    def codes(self, *shape: int) -> NDArray[np.int8]:
        return self.rng.integers(-127, 128, shape).astype(np.int8)

    def finish(self, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        def info(name: str) -> onnx.ValueInfoProto:
            kind = TensorProto.UINT8 if name in self.coded else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, self.sizes.get(name))

        graph = helper.make_graph(
            self.nodes,
            "timing",
            [info(n) for n in inputs],
            [info(n) for n in outputs],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        content: bytes = model.SerializeToString()
        return content


_CONTRIBUTED = {
    "QGemm", "MatMulNBits", "QLinearAdd", "QLinearGlobalAveragePool", "QLinearAveragePool",
}  # fmt: skip


def single_call(work: Work, kernel: str) -> bytes:
    """A model of one call with a ReLU where one can be fused."""
    model = _Model()
    inputs = ["a", "b"] if _reads_two(work) else ["a"]
    call = Call(work, kernel, tuple(inputs), "y", 0, relu=work.operator in ("conv", "linear"))
    shapes = _input_shapes(work)
    for name, shape in zip(inputs, shapes, strict=True):
        model.sizes[name] = shape
    is_coded = kernel == "int8" and work.operator != "quantize"
    model.coded = set(inputs) if is_coded else set()
    if work.operator == "layout":
        # what is timed is how the values get into a convolution's own layout and out of it
        conv = layout_probe(work)
        call = Call(conv, kernel, ("a",), "y", 0)
        model.sizes["a"] = (1, *conv.dims[:1], *conv.dims[2:])
    if work.operator == "conv" and _reads_two(work) and not is_coded:
        call = replace(call, inputs=("a", _blocked_addend(model, work)))
    if work.operator == "copy":
        _copy_probe(model, call)
    else:
        _emit(model, call)
    return model.finish(inputs, ["y"])


def _blocked_addend(model: _Model, work: Work) -> str:
    """What is added comes from another convolution, as in a network: its layout fits."""
    _, channels, height, width = model.sizes["b"]
    model.sizes["b"] = (1, 1, height, width)
    weight = model.constant(model.floats(channels, 1, 1, 1))
    return model.node("Conv", ["b", weight], f"{HELPER}.out")


def layout_probe(work: Work) -> Work:
    """A cheap convolution whose input and output have about as many elements as `work`."""
    pixels = max(1, -(-work.dim("elements") // 16))
    attributes = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (1,), (0,))
    return Work("conv", (16, 16, pixels, 1), attributes)


def network(graph: Graph, calls: Sequence[Call]) -> bytes:
    """The model of a whole network, for a batch of one.

    Args:
        graph: after removal.
        calls: as `calls_of` gives them for it, nothing removed.

    Raises:
        UsageError: an operator that cannot be built for timing.
    """
    model = _Model()
    inputs = [f"v{index}" for index in graph.input_nodes]
    for name, index in zip(inputs, graph.input_nodes, strict=True):
        model.sizes[name] = graph.nodes[index].shape
    for call in calls:
        if call.is_implicit:
            continue
        if call.work.operator in ("view", "copy") or _is_unary(graph, call):
            _emit_node(model, graph, call)
        else:
            _emit(model, call)
        _reshape_to(model, call, graph.nodes[call.node].shape)
    outputs = output_names(graph, list(calls))
    return model.finish(inputs, list(dict.fromkeys(outputs)))


def _reads_two(work: Work) -> bool:
    return work.operator == "add" or work.adds


def _input_shapes(work: Work) -> list[tuple[int, ...]]:
    if work.operator == "conv":
        first = (1, work.dims[0], *work.dims[2:])
        return [first, (1, work.dims[1], *work.out_size)] if _reads_two(work) else [first]
    if work.operator == "linear":
        return [(work.dim("rows"), work.dim("in_features"))]
    if work.operator in ("max_pool", "average_pool", "mean"):
        return [(1, *work.dims)]
    elements = work.dims[0]
    if work.operator == "copy":
        return [(1, -(-elements // work.dim("run")), 2, work.dim("run"))]
    return [(1, elements)] * (2 if work.operator == "add" else 1)


def _emit(model: _Model, call: Call) -> None:
    """One call, its output's shape noted."""
    emit = {
        "conv": _conv,
        "linear": _linear,
        "add": _add,
        "quantize": _convert,
        "dequantize": _convert,
    }.get(call.work.operator, _pool)
    emit(model, call)


def _conv(model: _Model, call: Call) -> None:
    work = call.work
    kernel, groups = work.attribute("kernel"), work.groups
    n_in, n_out = work.dims[:2]
    shape = (n_out, n_in // groups, *kernel)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": work.attribute("stride"),
        "pads": work.attribute("pads"),
        "dilations": work.attribute("dilation"),
        "group": groups,
    }
    adds = work.adds
    out = f"{call.output}.conv" if adds else call.output
    model.sizes[call.output] = model.sizes[out] = (1, n_out, *work.out_size)
    if call.kernel == "int8":
        relu = call.relu and not adds
        inputs = [
            call.inputs[0], *model.qparams(), model.constant(model.codes(*shape)),
            model.constant(np.full(n_out, 0.01, np.float32)),
            model.constant(np.zeros(n_out, np.int8)), *model.qparams(relu=relu),
            model.constant(np.zeros(n_out, np.int32)),
        ]  # fmt: skip
        model.node("QLinearConv", inputs, out, **attributes)
        model.coded |= {out}
        if adds:
            _quantized_sum(model, out, call.inputs[1], call)
        return
    bias = model.constant(np.zeros(n_out, np.float32))
    weight = model.constant(model.floats(*shape))
    before = f"{call.output}.sum" if call.relu else call.output
    result = out if adds else before
    model.node("Conv", [call.inputs[0], weight, bias], result, **attributes)
    if adds:
        model.node("Add", [out, call.inputs[1]], before)
    if call.relu:
        model.node("Relu", [before], call.output)


def _linear(model: _Model, call: Call) -> None:
    n_in, n_out, rows = call.work.dims
    source = call.inputs[0]
    if len(model.sizes[source]) != 2:
        flat = f"{source}.rows"
        size = model.constant(np.array([rows, n_in], np.int64))
        source = model.node("Reshape", [source, size], flat)
    model.sizes[call.output] = (rows, n_out)
    before = f"{call.output}.sum" if call.relu else call.output
    bits = weight_kernel_bits(call.kernel)
    if call.kernel == "int8":
        inputs = [
            source, *model.qparams(), model.constant(model.codes(n_out, n_in)),
            model.constant(np.full(n_out, 0.01, np.float32)),
            model.constant(np.zeros(n_out, np.int8)), model.constant(np.zeros(n_out, np.int32)),
        ]  # fmt: skip
        if not call.to_float:
            inputs += model.qparams(relu=call.relu)
            model.coded |= {call.output}
        model.node("QGemm", inputs, call.output, transB=1)
        return
    bias = model.constant(np.zeros(n_out, np.float32))
    if bits:
        block = block_size(n_in)
        n_blocks = -(-n_in // block)
        packed = model.rng.integers(0, 256, (n_out, n_blocks, block * bits // 8)).astype(np.uint8)
        scales = np.full((n_out, n_blocks), 0.01, np.float32)
        model.node(
            "MatMulNBits",
            [source, model.constant(packed), model.constant(scales), "", "", bias],
            before,
            K=n_in,
            N=n_out,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
    else:
        weight = model.constant(model.floats(n_out, n_in))
        model.node("Gemm", [source, weight, bias], before, transB=1)
    if call.relu:
        model.node("Relu", [before], call.output)


def _add(model: _Model, call: Call) -> None:
    model.sizes[call.output] = model.sizes[call.inputs[0]]
    if len(call.inputs) != 2:
        raise UsageError("only sums of two values can be built for timing")
    if call.kernel == "int8":
        _quantized_sum(model, *call.inputs, call)
        return
    before = f"{call.output}.sum" if call.relu else call.output
    model.node("Add", call.inputs, before)
    if call.relu:
        model.node("Relu", [before], call.output)


def _quantized_sum(model: _Model, one: str, two: str, call: Call) -> None:
    inputs = [one, *model.qparams(), two, *model.qparams(), *model.qparams(relu=call.relu)]
    model.node("QLinearAdd", inputs, call.output)
    model.coded |= {call.output}


def _convert(model: _Model, call: Call) -> None:
    model.sizes[call.output] = model.sizes[call.inputs[0]]
    op = "QuantizeLinear" if call.work.operator == "quantize" else "DequantizeLinear"
    model.coded |= {call.output} if op == "QuantizeLinear" else set()
    model.node(op, [call.inputs[0], *model.qparams()], call.output)


def _pool(model: _Model, call: Call) -> None:
    work, is_coded = call.work, call.kernel == "int8"
    model.coded |= {call.output} if is_coded else set()
    quantized = [call.inputs[0], *model.qparams(), *model.qparams()]
    if work.operator == "mean":
        model.sizes[call.output] = (1, work.dims[0], 1, 1)
        if is_coded:
            model.node("QLinearGlobalAveragePool", quantized, call.output)
        else:
            model.node("GlobalAveragePool", call.inputs[:1], call.output)
        return
    model.sizes[call.output] = (1, work.dims[0], *work.out_size)
    attributes: dict[str, Any] = {
        "kernel_shape": work.attribute("kernel"),
        "strides": work.attribute("stride"),
        "pads": work.attribute("pads"),
    }
    if work.operator == "max_pool":
        model.node("MaxPool", call.inputs[:1], call.output, **attributes)
    elif is_coded:
        model.node("QLinearAveragePool", quantized, call.output, **attributes)
    else:
        model.node("AveragePool", call.inputs[:1], call.output, **attributes)


def _copy_probe(model: _Model, call: Call) -> None:
    """Every second run of elements, as shortcuts without weights take them."""
    model.coded |= {call.output} if call.kernel == "int8" else set()
    _slice(model, call, 2, 0, 2**31 - 1, 2)


def _slice(model: _Model, call: Call, axis: int, start: int, end: int, step: int) -> None:
    ends = [model.constant(np.array([n], np.int64)) for n in (start, end, axis, step)]
    model.node("Slice", [call.inputs[0], *ends], call.output)


def _is_unary(graph: Graph, call: Call) -> bool:
    sources = [r for arg in graph.nodes[call.node].args for r in refs_in(arg)]
    return call.work.operator == "add" and len(sources) < 2 and len(call.inputs) == 1


def _emit_node(model: _Model, graph: Graph, call: Call) -> None:
    """A call that is built from its node's arguments."""
    node = graph.nodes[int(call.output.removeprefix("v"))]
    source = call.inputs[0]
    model.coded |= {call.output} if source in model.coded else set()
    model.sizes[call.output] = node.shape
    op = node.op
    if call.work.operator == "view":
        size = model.constant(np.array(node.shape, np.int64))
        model.node("Reshape", [source, size], call.output)
    elif op in _UNARY:
        model.node(_UNARY[op], [source], call.output)
    elif op == "slice.Tensor":
        given = [*node.args[1:], *[None] * 4][:4]
        axis, start, end, step = (
            d if a is None else int(a)  # type: ignore[arg-type]
            for a, d in zip(given, (0, 0, 2**31 - 1, 1), strict=True)
        )
        _slice(model, call, axis, start, end, step)
    elif op in ("pad.default", "constant_pad_nd.default"):
        amounts = node.args[1]
        assert isinstance(amounts, tuple)
        pairs = pad_pairs(amounts, len(node.shape))
        flat = [a for a, _ in pairs] + [b for _, b in pairs]
        value = np.uint8(MIDDLE) if source in model.coded else np.float32(0)
        padding = [model.constant(np.array(flat, np.int64)), model.constant(np.array(value))]
        model.node("Pad", [source, *padding], call.output)
    elif op == "cat.default":
        along = node.args[1] if len(node.args) > 1 else 0
        model.node("Concat", call.inputs, call.output, axis=along)
    elif op == "bitfront.gather_channels":
        _, along, positions = node.args
        index = model.constant(np.maximum(np.array(positions, np.int64), 0))
        model.node("Gather", [source, index], call.output, axis=along)
    else:
        raise UsageError(f"the operator {op} ({node.name}) cannot be built for timing")


def _reshape_to(model: _Model, call: Call, shape: tuple[int, ...]) -> None:
    """Give a value the shape that its node has, where the call's own differs."""
    if not shape or model.sizes[call.output] == shape:
        return
    inner = f"{call.output}.flat"
    last = model.nodes[-1]
    last.output[0] = inner
    model.node("Reshape", [inner, model.constant(np.array(shape, np.int64))], call.output)
    model.sizes[call.output] = shape
