"""Collects nodes, initializers and local functions of an ONNX graph; names are short."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quant_ops.graph import Graph

OPSET, IR_VERSION = 25, 13  # the first with initializers of 2 bits
OWN_DOMAIN = "bitfront"
RUNTIME_DOMAIN = "com.microsoft"
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64, "int32": TensorProto.INT32, "int16": TensorProto.INT16,
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "bool": TensorProto.BOOL,
}  # fmt: skip


class Unsupported(Exception):
    """An operator that cannot be written: why, and the nearest thing that can."""

    def __init__(self, reason: str, instead: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.instead = instead


class GraphBuilder:
    """Grows in execution order; every method gives the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._known: dict[tuple[object, ...], str] = {}
        self._count = 0
        self.uses_runtime_domain = False

    def fresh(self) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"v{self._count}"

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """One operator with one output."""
        return self.nodes_out(op, inputs, 1, **attributes)[0]

    def nodes_out(
        self, op: str, inputs: Sequence[str], n_outputs: int, *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """One operator with several outputs."""
        outputs = [self.fresh() for _ in range(n_outputs)]
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        self.uses_runtime_domain |= domain == RUNTIME_DOMAIN
        return outputs

    def runtime_node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """One operator of ONNX Runtime's own."""
        return self.nodes_out(op, inputs, 1, domain=RUNTIME_DOMAIN, **attributes)[0]

    def call(self, function: onnx.FunctionProto, inputs: Sequence[str]) -> str:
        """A call of a local function, which is added when it is new."""
        self.functions.setdefault(function.name, function)
        return self.nodes_out(function.name, inputs, 1, domain=OWN_DOMAIN)[0]

    def constant(self, array: Any, dtype: Any = None) -> str:
        """An initializer; equal ones are stored once."""
        value: NDArray[Any] = np.ascontiguousarray(array, dtype).reshape(np.shape(array))
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = name = f"c{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(value, name))
        return self._known[key]

    def raw(self, data_type: int, dims: Sequence[int], content: bytes) -> str:
        """An initializer of any element type, from its stored bytes."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(
            TensorProto(name=name, data_type=data_type, dims=dims, raw_data=content)
        )
        return name

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(np.array(values, np.int64))

    def cast(self, value: str, dtype: str) -> str:
        """A conversion of the element type."""
        return self.node("Cast", [value], to=ELEMENT_TYPES[dtype])

    def model(
        self, graph: Graph, outputs: Sequence[str], shapes: Sequence[tuple[int, ...]], name: str
    ) -> onnx.ModelProto:
        """The finished model: inputs x0.., outputs y0.., the batch a free dimension."""
        inputs = []
        for number, index in enumerate(graph.input_nodes):
            node = graph.nodes[index]
            dims: list[int | str] = ["batch", *node.shape[1:]]
            kind = ELEMENT_TYPES[node.dtype]
            inputs.append(helper.make_tensor_value_info(f"x{number}", kind, dims))
        results = []
        for number, (value, shape) in enumerate(zip(outputs, shapes, strict=True)):
            self.nodes.append(helper.make_node("Identity", [value], [f"y{number}"]))
            kind = ELEMENT_TYPES[graph.nodes[graph.outputs[number].index].dtype]
            dims = ["batch", *shape[1:]]
            results.append(helper.make_tensor_value_info(f"y{number}", kind, dims))
        opsets = [helper.make_opsetid("", OPSET)]
        if self.functions:
            opsets.append(helper.make_opsetid(OWN_DOMAIN, 1))
        if self.uses_runtime_domain:
            opsets.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
        return helper.make_model(
            helper.make_graph(self.nodes, name, inputs, results, self.initializers),
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="bitfront",
            functions=list(self.functions.values()),
        )
