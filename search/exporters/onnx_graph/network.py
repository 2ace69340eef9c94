"""A packed model as an ONNX model, or the list of what stands in the way."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from quant_ops.lowering import lower
from quant_ops.program import Call, IntegerProgram, Move
from quant_ops.quantized import QuantizedModel
from search.exporters.base import Refusal
from search.exporters.onnx_graph.builder import ELEMENT_TYPES, Unsupported
from search.exporters.onnx_graph.float_steps import picked, put_call
from search.exporters.onnx_graph.integer_steps import INTEGER_STEPS
from search.exporters.onnx_graph.moves import MOVES, Moved
from search.exporters.onnx_graph.state import Value, WriterState, int_of


@dataclass(frozen=True)
class Written:
    """The model, or why there is none.

    Attributes:
        codes: edge name to the name of its uint8 tensor (code - lowest); not of wide values.
    """

    model: onnx.ModelProto | None
    refusals: tuple[Refusal, ...]
    codes: Mapping[str, str] = field(default_factory=dict)


def write_network(
    model: QuantizedModel, program: IntegerProgram | None = None, *, exact: bool = False
) -> Written:
    """Write every step of a network without removed channels (`quant_ops.reduced`).

    With `exact` every rescaling is the normative one, else that of `quant_ops.runtime_mode`.
    """
    program = lower(model) if program is None else program
    state = WriterState(model, program, exact=exact)
    refusals = []
    for index in model.graph.input_nodes:
        node = model.graph.nodes[index]
        if node.dtype not in ELEMENT_TYPES:
            refusals.append(Refusal(node.name, f"an input of type {node.dtype}", "use float32"))
    for step in program.steps:
        try:
            state.values[step.out] = _put(state, step)
        except Unsupported as why:
            where = f"{step.name} ({model.graph.nodes[model.graph.index_of[step.name]].op})"
            refusals.append(Refusal(where, why.reason, why.instead))
            state.values[step.out] = "refused"
    outputs = []
    for ref in model.graph.outputs:
        value = state.values[ref.index]
        if not isinstance(value, str):
            refusals.append(Refusal("output", "it is several tensors", "give one of them"))
            continue
        outputs.append(state.dequantized(ref.index) if state.is_codes(ref.index) else value)
    if refusals:
        return Written(None, tuple(refusals))
    shapes = [model.graph.nodes[ref.index].shape for ref in model.graph.outputs]
    names = {edge: state.values[n] for edge, n in program.edges.items() if state.is_codes(n)}
    return Written(
        without_dead_ends(state.builder.model(model.graph, outputs, shapes, "bitfront")),
        (),
        {edge: name for edge, name in names.items() if isinstance(name, str)},
    )


def with_codes(written: Written) -> onnx.ModelProto:
    """The model with the codes of every edge as further outputs, to compare them."""
    assert written.model is not None
    model = onnx.ModelProto()
    model.CopyFrom(written.model)
    for name in written.codes.values():
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
        )
    return model


def _put(state: WriterState, step: object) -> Value:
    if isinstance(step, Call):
        return put_call(state, step)
    if isinstance(step, Move):
        return _move(state, step)
    return INTEGER_STEPS[type(step)](state, step)  # type: ignore[index]


def _move(state: WriterState, step: Move) -> Value:
    source = step.sources[0]
    if step.op == "getitem":
        return picked(state, source, int_of(step.args[1]))
    if step.op not in MOVES:
        raise Unsupported(
            f"operator {step.op} has no ONNX form here", "replace it, or export to packed"
        )
    is_codes = state.is_codes(source)
    fill = state.zero(source) if is_codes else 0.0
    moved = Moved(
        state,
        state.value(source),
        state.graph.nodes[source].shape,
        state.graph.nodes[step.out].shape,
        step.args,
        state.builder.constant(np.uint8(fill) if is_codes else np.float32(fill)),
        is_codes,
    )
    return MOVES[step.op](moved)


def without_dead_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without what no output needs (sizes that became -1)."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    initializers = [x for x in graph.initializer if x.name in needed]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    return model
