"""torch.export -> Graph: operators of the closed list, shapes, MACs, layers."""

import inspect
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from quant_ops.fold import fold_batch_norms, norm_statistics
from quant_ops.graph import (
    Arg,
    Graph,
    Node,
    ParamRef,
    Ref,
    Shape,
    map_refs,
    params_in,
    refs_in,
)
from quant_ops.layers import find_layers
from quant_ops.operators import OPCODES
from search.quiet import chatter_discarded

_SIZE_OPS = {
    operator.add: "size.add",
    operator.sub: "size.sub",
    operator.mul: "size.mul",
    operator.floordiv: "size.floordiv",
    operator.neg: "size.neg",
    operator.mod: "size.mod",
}
# The value passes through unchanged; contiguity is of no concern because view becomes reshape.
_IDENTITY = {
    "clone.default", "contiguous.default", "detach.default", "alias.default", "dropout.default",
    "lift_fresh_copy.default", "feature_dropout.default", "alpha_dropout.default",
}  # fmt: skip
_RENAMED = {"view.default": "reshape.default", "_unsafe_view.default": "reshape.default"}
_MAX_INDEX = 2**62


@dataclass(frozen=True)
class Traced:
    """A float network ready for quantization: batch norms folded, every parameter named.

    Attributes:
        graph: operators and layers.
        params: parameter name to float tensor.
        out_spec: tree of the model's outputs.
        static_batch: the only batch size the graph accepts, or None if any.
        float_bytes: bytes of the original model's parameters.
        norms: layer name to (beta, |gamma|) of the batch norm that was folded into it.
    """

    graph: Graph
    params: Mapping[str, Tensor]
    out_spec: pytree.TreeSpec
    static_batch: int | None
    float_bytes: int
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def trace(model: nn.Module, example_inputs: Sequence[Tensor]) -> Traced:
    """Capture `model` in evaluation mode.

    Args:
        model: any module that torch.export captures.
        example_inputs: one batch of inputs; dimension 0 of each is the batch.

    Raises:
        UsageError: weights that are not finite, or a model that torch.export cannot capture.
    """
    _require_finite(model)
    was_training = model.training
    model.eval()
    try:
        program, static_batch = _export(model, tuple(example_inputs))
    finally:
        model.train(was_training)
    graph, params = _Reader(program).read()
    norms = norm_statistics(graph, params)
    graph, params = fold_batch_norms(graph, params)
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Traced(graph, params, out_spec, static_batch, float_bytes, norms)


def _require_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UsageError(
                f"the model must have finite weights, but {name!r} holds {bad} NaN or infinite "
                f"values of {tensor.numel()}; load a sound checkpoint"
            )


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[torch.export.ExportedProgram, int | None]:
    two = tuple(torch.cat([x, x])[:2] if x.shape[0] < 2 else x for x in inputs)
    with warnings.catch_warnings(), chatter_discarded():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, two, dynamic_shapes=_any_batch(model, two))
            static_batch = None if _batch_is_symbolic(program) else 1
            if static_batch:
                program = torch.export.export(model, tuple(x[:1] for x in inputs))
        except Exception:
            try:
                program = torch.export.export(model, tuple(x[:1] for x in inputs))
                static_batch = 1
            except Exception as error:
                raise UsageError(_cannot_capture(model, error)) from error
        return program.run_decompositions({}), static_batch


def _any_batch(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """A free dimension 0 for every argument of `forward`, `*arguments` included."""
    free = {0: torch.export.Dim.AUTO}
    bound = inspect.signature(model.forward).bind(*inputs).arguments
    return {
        name: tuple(free for _ in value) if isinstance(value, tuple) else free
        for name, value in bound.items()
    }


def _cannot_capture(model: nn.Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    where = next(
        (line for line in lines if line.startswith("File ") or "from user code" in line), ""
    )
    user_line = next(
        (line for line in reversed(lines) if line.startswith("File ") and "/torch/" not in line),
        where,
    )
    at = f" at {user_line}" if user_line else ""
    return (
        f"torch.export cannot capture {type(model).__name__}{at}: {reason}; rewrite that part "
        f"without Python control flow on tensor values"
    )


def _batch_is_symbolic(program: torch.export.ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    return all(
        isinstance(node.meta["val"].shape[0], torch.SymInt)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    )


class _Reader:
    """Turns an exported program into nodes, one pass in execution order."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._nodes: list[Node] = []
        self._params: dict[str, Tensor] = {}
        self._value: dict[str, Arg] = {}  # name in the program -> our argument
        self._taken: set[str] = set()

    def read(self) -> tuple[Graph, dict[str, Tensor]]:
        self._bind_placeholders()
        outputs: tuple[Ref, ...] = ()
        for fx_node in self._program.graph.nodes:
            if fx_node.op == "output":
                outputs = tuple(self._as_value(v) for v in fx_node.args[0])
            elif fx_node.op == "call_function":
                self._read_call(fx_node)
        nodes, outputs = _without_dead_nodes(self._nodes, outputs)
        graph = Graph(tuple(nodes), outputs, find_layers(nodes, self._params))
        used = {name for node in graph.nodes for name in params_in(node.args)}
        params = {name: t for name, t in self._params.items() if name in used}
        return graph, params

    def _bind_placeholders(self) -> None:
        signature = self._program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = dict(signature.inputs_to_lifted_tensor_constants)
        state = self._program.state_dict
        first_name: dict[tuple[int, Shape], str] = {}  # a shared parameter keeps one name
        for fx_node in self._program.graph.nodes:
            if fx_node.op != "placeholder":
                continue
            if fx_node.name in named or fx_node.name in constants:
                name = named.get(fx_node.name) or constants[fx_node.name]
                tensor = state[name] if name in state else self._program.constants[name]
                tensor = tensor.detach()
                key = (tensor.data_ptr(), tuple(tensor.shape))
                name = first_name.setdefault(key, name) if tensor.numel() else name
                if name not in self._params:  # a copy: the user may go on training the model
                    self._params[name] = tensor.clone()
                self._value[fx_node.name] = ParamRef(name)
            elif fx_node.name in signature.user_inputs:
                value = fx_node.meta["val"]
                self._append(Node("input", (), fx_node.name, _shape(value), _dtype(value)), fx_node)

    def _read_call(self, fx_node: torch.fx.Node) -> None:
        target = fx_node.target
        if target is operator.getitem:
            source, item = fx_node.args
            assert isinstance(source, torch.fx.Node)
            assert isinstance(item, int)
            if "batch_norm" in str(source.target):
                self._value[fx_node.name] = self._value[source.name]
                return
            op = "getitem"
        elif target in _SIZE_OPS:
            op = _SIZE_OPS[target]
        else:
            op = str(target).removeprefix("aten.")
        if op in _IDENTITY:
            self._value[fx_node.name] = self._arg(fx_node.args[0])
            return
        op = _RENAMED.get(op, op)
        if op not in OPCODES:
            raise UsageError(
                f"operator {op!r} (node {fx_node.name!r}{_origin(fx_node)}) is not on the list of "
                f"operators that a packed model may hold; replace it by ones that are"
            )
        args = tuple(self._arg(a) for a in _positional(fx_node))
        value = fx_node.meta["val"]
        self._append(Node(op, args, fx_node.name, _shape(value), _dtype(value)), fx_node)

    def _append(self, node: Node, fx_node: torch.fx.Node) -> None:
        self._value[fx_node.name] = Ref(len(self._nodes))
        self._nodes.append(node)

    def _arg(self, value: Any) -> Arg:
        if isinstance(value, torch.fx.Node):
            return self._value[value.name]
        if isinstance(value, list | tuple):
            return tuple(self._arg(v) for v in value)
        if isinstance(value, torch.dtype):
            return f"dtype:{str(value).removeprefix('torch.')}"
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value > _MAX_INDEX:
            return 2**31 - 1
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UsageError(f"argument {value!r} of the exported program cannot be stored")

    def _as_value(self, value: Any) -> Ref:
        found = self._arg(value)
        if isinstance(found, ParamRef):  # a model may return a parameter unchanged
            tensor = self._params[found.name]
            self._nodes.append(
                Node("param", (found,), f"param_{len(self._nodes)}", tuple(tensor.shape))
            )
            return Ref(len(self._nodes) - 1)
        if not isinstance(found, Ref):
            raise UsageError(f"every output of the model must be a tensor, got {value!r}")
        return found


def _positional(fx_node: torch.fx.Node) -> list[Any]:
    """All arguments in schema order, trailing defaults dropped."""
    target = fx_node.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(fx_node.args)
    schema = target._schema.arguments
    filled = [
        fx_node.args[i] if i < len(fx_node.args) else fx_node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema)
    ]
    # A device is a property of the machine, not of the model.
    filled = [
        None if a.name in ("device", "layout", "pin_memory") else v
        for a, v in zip(schema, filled, strict=True)
    ]
    while filled and len(filled) > 1 and _same(filled[-1], schema[len(filled) - 1].default_value):
        filled.pop()
    return filled


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _origin(fx_node: torch.fx.Node) -> str:
    stack = fx_node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return f" in module {path!r}" if path else ""


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _shape(value: Any) -> Shape:
    value = _first(value)
    if not isinstance(value, Tensor):
        return ()
    return tuple(_for_one_sample(size) for size in value.shape)


def _for_one_sample(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
    return int(size)


def _dtype(value: Any) -> str:
    value = _first(value)
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""


def _without_dead_nodes(
    nodes: Sequence[Node], outputs: tuple[Ref, ...]
) -> tuple[list[Node], tuple[Ref, ...]]:
    alive = {ref.index for ref in outputs}
    for index in reversed(range(len(nodes))):
        if index in alive or nodes[index].op == "input":
            alive.add(index)
            alive.update(ref.index for ref in refs_in(nodes[index].args))
    index_map = {old: new for new, old in enumerate(sorted(alive))}
    kept = []
    for old in sorted(alive):
        node = nodes[old]
        args = tuple(map_refs(a, index_map) for a in node.args)
        kept.append(Node(node.op, args, node.name, node.shape, node.dtype))
    return kept, tuple(Ref(index_map[ref.index]) for ref in outputs)
