"""From a graph and a candidate to the calls that a device would make."""

import math
from dataclasses import replace

import torch

from cost_models.latency.lowering_state import CallValue, KernelFor, LoweringState
from cost_models.latency.work import DEPTHWISE, Call, Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused
from quant_ops.edges import edge_of, fused_clamp
from quant_ops.errors import UsageError
from quant_ops.graph import Graph, Node, Ref, refs_in
from quant_ops.operator_kinds import POINTWISE, SUMS, ZERO_KEEPING, pad_pairs
from quant_ops.operators import CONV, LINEAR
from quant_ops.removal import Removal, plan_removal, remove_channels
from quant_ops.windows import geometry_of, ints

BLOCK = 16  # channels that kernels with a layout of their own take at once
_VIEWS = frozenset({
    "reshape.default", "flatten.using_ints", "unflatten.int", "unsqueeze.default", "t.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "view_as.default", "param", "getitem",
})  # fmt: skip
_COPIES = frozenset({
    "slice.Tensor", "pad.default", "constant_pad_nd.default", "cat.default", "permute.default",
    "transpose.int", "bitfront.gather_channels", "select.int", "flip.default", "roll.default",
})  # fmt: skip
_ADDS = ZERO_KEEPING | POINTWISE | SUMS | {"mul.Tensor", "div.Tensor", "bitfront.channel_affine"}
_MAX_POOLS = frozenset({"max_pool2d.default", "max_pool2d_with_indices.default"})


def calls_of(
    graph: Graph, candidate: Candidate, removal: Removal, kernel_for: KernelFor
) -> list[Call]:
    """The calls in execution order; views are calls of operator "view", which cost nothing.

    A layer runs on integers when its weights and its input are quantized and the device has a
    kernel for that; else its input is float. Values change type and layout where they have to.

    Args:
        graph: folded network.
        candidate: without unused residuals.
        removal: what leaves the network.
        kernel_for: (operator, weight bits, activation bits) to the name of the device's kernel;
            32 bits mean float, 0 weight bits a call without weights.

    Raises:
        UsageError: an operator that no table knows.
    """
    state = LoweringState(graph, candidate, removal, kernel_for)
    for index, node in enumerate(graph.nodes):
        if not node.dtype:
            continue
        if index in state.fused:
            state.values[index] = state.values[state.fused[index]]
        elif node.op == "input":
            state.values[index] = CallValue(f"v{index}", FLOAT_BITS)
            _quantize_result(state, index, index)
        else:
            _lower(state, index, node)
    for ref in graph.outputs:
        value = state.converted(ref.index, bits=FLOAT_BITS, blocked=False)
        state.values[ref.index] = value
    return state.calls


def output_names(graph: Graph, calls: list[Call]) -> list[str]:
    """Names of the graph's outputs among the values that calls write: the last of each node."""
    last = {call.node: call.output for call in calls if not call.is_implicit}
    return [last[ref.index] for ref in graph.outputs]


def _lower(state: LoweringState, index: int, node: Node) -> None:
    if node.op in CONV and len(node.shape) == 4:
        _lower_conv(state, index)
    elif node.op in LINEAR:
        _lower_linear(state, index)
    elif node.op in _VIEWS or _is_whole_slice(state.graph, index):
        _lower_view(state, index)
    elif node.op in _COPIES:
        run = min(_run_of(state, index), state.elements(index))
        _lower_data(state, index, Work("copy", (state.elements(index), run)))
    elif (pool := _pool_of(state, index)) is not None:
        _lower_data(state, index, pool)
    elif node.op in _ADDS:
        _lower_data(state, index, Work("add", (state.elements(index),)))
    else:
        raise UsageError(
            f"a latency table has no entries for the operator {node.op} ({node.name}); latency is "
            f"known of two-dimensional convolutions, linear layers, additions, pools and what "
            f"works element by element: leave --latency-table out for this network"
        )


def _lower_conv(state: LoweringState, index: int) -> None:
    graph, node = state.graph, state.graph.nodes[index]
    layer, source = graph.layer_at[index], state.source(index)
    kernel_size = layer.weight_shape[2:]
    stride, pads, dilation, _ = geometry_of(node, kernel_size)
    weight_bits, quant = _weight_bits(state.assignment.get(layer.name))
    in_bits = state.values[source].bits if quant else FLOAT_BITS
    kernel = state.kernel_for("conv", weight_bits, in_bits)
    n_in, n_out = state.channels(source), state.removal.n_rows(layer)
    height, width = graph.nodes[source].shape[2:]
    depthwise = layer.groups > 1 and layer.groups == layer.out_channels == n_in_full(graph, source)
    other = _fusible_addend(state, index, in_bits)
    groups = DEPTHWISE if depthwise else layer.groups
    work = Work(
        "conv",
        (n_in, n_out, height, width),
        (
            kernel_size, stride, (*(a for a, _ in pads), *(b for _, b in pads)), dilation,
            (groups,), (int(other is not None),),
        ),
    )  # fmt: skip
    takes_plain = n_in < BLOCK and in_bits == FLOAT_BITS
    blocked = None if takes_plain else True
    inputs = [state.converted(source, bits=in_bits, blocked=blocked).name]
    end = index
    if other is not None:
        (end,) = graph.consumers[index]
        state.fused[end] = index
        inputs.append(state.converted(other, bits=in_bits, blocked=True).name)
    clamp = fused_clamp(graph, end)
    last = end if clamp is None else clamp
    if clamp is not None:
        state.fused[clamp] = index
    bits = state.quantized_at.get(last, FLOAT_BITS) if in_bits < FLOAT_BITS else FLOAT_BITS
    call = Call(
        work, kernel, tuple(inputs), f"v{index}", last, relu=clamp is not None, layer=layer.name
    )
    state.calls.append(call)
    coded = in_bits < FLOAT_BITS and bits == FLOAT_BITS  # codes that nobody reads as such
    state.values[index] = CallValue(call.output, 8 if coded else bits, is_blocked=True)
    if coded:
        state.values[index] = state.converted(index, bits=FLOAT_BITS, blocked=None)
    _quantize_result(state, index, last)


def n_in_full(graph: Graph, source: int) -> int:
    """Channels of a value before anything is removed."""
    return graph.nodes[source].shape[1]


def _fusible_addend(state: LoweringState, index: int, in_bits: int) -> int | None:
    """The value that is added to a convolution's by the same call, if there is one."""
    graph = state.graph
    users = graph.consumers[index]
    if len(users) != 1 or graph.nodes[users[0]].op != "add.Tensor" or Ref(index) in graph.outputs:
        return None
    terms = [ref.index for arg in graph.nodes[users[0]].args for ref in refs_in(arg)]
    others = [t for t in terms if t != index]
    if len(others) != 1 or others[0] not in state.values:
        return None
    (other,) = others
    if graph.nodes[other].shape != graph.nodes[index].shape:
        return None
    if in_bits < FLOAT_BITS:
        clamp = fused_clamp(graph, users[0])
        result = users[0] if clamp is None else clamp
        if index not in state.quantized_at or result not in state.quantized_at:
            return None
    alike = (state.values[other].bits < FLOAT_BITS) == (in_bits < FLOAT_BITS)
    return other if alike else None


def _lower_linear(state: LoweringState, index: int) -> None:
    graph, node = state.graph, state.graph.nodes[index]
    layer, source = graph.layer_at[index], state.source(index)
    weight_bits, quant = _weight_bits(state.assignment.get(layer.name))
    in_bits = state.values[source].bits if quant else FLOAT_BITS
    n_out = state.removal.n_rows(layer)
    n_in = state.removal.n_weights(layer) // max(1, n_out)
    work = Work("linear", (n_in, n_out, math.prod(node.shape[:-1])))
    clamp = fused_clamp(graph, index)
    last = index if clamp is None else clamp
    if clamp is not None:
        state.fused[clamp] = index
    value = state.converted(source, bits=in_bits, blocked=False)
    bits = state.quantized_at.get(last, FLOAT_BITS) if in_bits < FLOAT_BITS else FLOAT_BITS
    state.calls.append(
        Call(
            work,
            state.kernel_for("linear", weight_bits, in_bits),
            (value.name,),
            f"v{index}",
            last,
            relu=clamp is not None,
            to_float=in_bits < FLOAT_BITS and bits == FLOAT_BITS,
            layer=layer.name,
        )
    )
    state.values[index] = CallValue(f"v{index}", bits)
    _quantize_result(state, index, last)


def _lower_view(state: LoweringState, index: int) -> None:
    source = state.source(index)
    keeps_layout = state.graph.nodes[source].shape == state.graph.nodes[index].shape
    value = state.values[source]
    value = state.converted(source, bits=value.bits, blocked=None if keeps_layout else False)
    state.calls.append(Call(Work("view", ()), "", (value.name,), f"v{index}", index))
    state.values[index] = replace(value, name=f"v{index}")


def _lower_data(state: LoweringState, index: int, work: Work) -> None:
    """A call without weights: on codes where all that it reads and writes are, else on floats."""
    graph = state.graph
    sources = [ref.index for arg in graph.nodes[index].args for ref in refs_in(arg)]
    sources = [s for s in sources if s in state.values and graph.nodes[s].dtype]
    clamp = fused_clamp(graph, index)
    last = index if clamp is None else clamp
    if clamp is not None:
        state.fused[clamp] = index
    bits = max(state.values[s].bits for s in sources)
    passes = last in state.quantized_at or edge_of(graph, index) == edge_of(graph, sources[0])
    if not passes or (work.operator == "add" and not _is_sum(graph, index)):
        bits = FLOAT_BITS
    blocked = all(state.values[s].is_blocked for s in sources)
    if work.operator == "copy" and bits == FLOAT_BITS:
        blocked = False
    inputs = [state.converted(s, bits=bits, blocked=blocked).name for s in sources]
    state.add(work, tuple(inputs), f"v{index}", last, bits)
    state.calls[-1] = replace(state.calls[-1], relu=clamp is not None)
    state.values[index] = CallValue(f"v{index}", bits, blocked)
    _quantize_result(state, index, last)


def _run_of(state: LoweringState, index: int) -> int:
    """Elements that a copy moves at once, from the axis that it cuts or joins along."""
    node = state.graph.nodes[index]
    shape = list(node.shape)
    axis, step = len(shape) - 1, 1
    if node.op == "slice.Tensor":
        given = [*node.args[1:], *[None] * 4]
        axis, step = (d if a is None else int(a) for a, d in ((given[0], 0), (given[3], 1)))  # type: ignore[arg-type]
    elif node.op in ("pad.default", "constant_pad_nd.default"):
        amounts = node.args[1]
        assert isinstance(amounts, tuple)
        changed = [a for a, pair in enumerate(pad_pairs(amounts, len(shape))) if any(pair)]
        axis = changed[-1] if changed else 0
    elif node.op in ("cat.default", "bitfront.gather_channels"):
        at = node.args[1] if len(node.args) > 1 else 0
        axis = at if isinstance(at, int) else 0
    else:
        return 1
    axis %= len(shape)
    source = next(ref.index for arg in node.args for ref in refs_in(arg))
    value = state.values[source]
    if value.is_blocked and value.bits < FLOAT_BITS and len(shape) == 4:  # channels last
        shape = [shape[0], *shape[2:], shape[1]]
        axis = {0: 0, 1: 3, 2: 1, 3: 2}[axis]
    return math.prod(shape[axis + (step > 1) :])


def _is_sum(graph: Graph, index: int) -> bool:
    return graph.nodes[index].op == "add.Tensor"


def _quantize_result(state: LoweringState, index: int, last: int) -> None:
    """Make a value codes where the candidate quantizes it and its call gave floats."""
    bits = state.quantized_at.get(last)
    value = state.values[index]
    if bits is None:
        return
    if value.bits < FLOAT_BITS:
        state.values[index] = replace(value, bits=bits)
    else:
        state.values[index] = state.converted(index, bits=bits, blocked=None)


def _weight_bits(quant: LayerQuant | None) -> tuple[int, bool]:
    """The widest channel's width, as a kernel has one width for all; whether there is any."""
    if quant is None:
        return FLOAT_BITS, False
    return max(1, math.ceil(max(quant.bit_widths))), True


def _is_whole_slice(graph: Graph, index: int) -> bool:
    node = graph.nodes[index]
    if node.op != "slice.Tensor":
        return False
    source = node.args[0]
    return isinstance(source, Ref) and graph.nodes[source.index].shape == node.shape


def _pool_of(state: LoweringState, index: int) -> Work | None:
    graph, node = state.graph, state.graph.nodes[index]
    if not node.args or not isinstance(node.args[0], Ref):
        return None
    source = node.args[0].index
    shape = graph.nodes[source].shape
    if len(shape) != 4:
        return None
    dims = (state.channels(source), *shape[2:])
    if node.op in _MAX_POOLS or node.op == "avg_pool2d.default":
        kernel = ints(node.args[1], 2)
        given = [*node.args[2:], None, None]
        stride = ints(given[0], 2) if given[0] not in (None, ()) else kernel
        pads = ints(given[1], 2) if given[1] is not None else (0, 0)
        operator = "max_pool" if node.op in _MAX_POOLS else "average_pool"
        return Work(operator, dims, (kernel, stride, (*pads, *pads)))
    is_global = node.op == "adaptive_avg_pool2d.default" and ints(node.args[1], 2) == (1, 1)
    axes = node.args[1] if node.op == "mean.dim" else None
    if isinstance(axes, tuple) and {int(a) % 4 for a in axes} == {2, 3}:  # type: ignore[arg-type]
        is_global = True
    return Work("mean", dims) if is_global else None


def smaller_network(graph: Graph, candidate: Candidate) -> tuple[Graph, Candidate]:
    """The network without what the candidate removes, and the widths of what is left.

    A layer gets its widest channel's width: a kernel has one for all.
    """
    graph, candidate = without_unused(graph, candidate)
    removal = plan_removal(graph, candidate)
    zeros = {n: torch.zeros(shape) for n, shape in graph.param_shapes}
    smaller, _ = remove_channels(graph, zeros, removal)
    layers = {name: LayerQuant((max(q.bit_widths),)) for name, q in candidate.layers}
    layers = {n: q if q.uniform else LayerQuant((1,)) for n, q in layers.items()}
    return smaller, Candidate.of(layers, candidate.activation_bits)
