"""Edges: which values of a network carry an activation quantizer, and which share one.

An edge is named after the node that produces it. A pass-through operator only moves, drops or
compares codes, so its value keeps the edge of its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quant_ops.dual import partial_nodes
from quant_ops.graph import Graph, Node, Ref, refs_in
from quant_ops.operators import LAYER_OPS, OPERATORS
from quant_ops.per_graph import per_graph

# Operators whose value takes only values of their first argument, or zero.
PASS_THROUGH = frozenset({
    "relu.default", "bitfront.gather_channels", "getitem", "reshape.default", "permute.default",
    "transpose.int", "t.default", "flatten.using_ints", "unflatten.int", "unsqueeze.default",
    "squeeze.default", "squeeze.dim", "squeeze.dims", "expand.default", "repeat.default",
    "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "slice.Tensor",
    "select.int", "index_select.default", "gather.default", "reflection_pad1d.default",
    "reflection_pad2d.default", "replication_pad1d.default", "replication_pad2d.default",
    "flip.default", "roll.default", "pixel_shuffle.default", "pixel_unshuffle.default",
    "channel_shuffle.default", "unfold.default", "movedim.int", "expand_as.default",
    "view_as.default", "index.Tensor", "amax.default", "amin.default", "max.dim", "min.dim",
    "topk.default", "max_pool1d.default", "max_pool2d.default", "max_pool3d.default",
    "max_pool2d_with_indices.default", "max_pool3d_with_indices.default",
    "adaptive_max_pool1d.default", "adaptive_max_pool2d.default", "upsample_nearest1d.vec",
    "upsample_nearest2d.vec", "upsample_nearest3d.vec",
})  # fmt: skip
PADS = frozenset({"pad.default", "constant_pad_nd.default"})
FUSIBLE = frozenset({
    "relu.default", "relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default",
})  # fmt: skip
# Producers with an integer form, into which a following clamp is fused.
FUSING = LAYER_OPS - {"embedding.default"} | {
    "add.Tensor", "sub.Tensor", "mul.Tensor", "bitfront.channel_affine",
}  # fmt: skip
SPLITTING = frozenset({
    "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "max.dim",
    "min.dim", "topk.default", "max_pool2d_with_indices.default", "adaptive_max_pool2d.default",
    "max_pool3d_with_indices.default", "adaptive_max_pool1d.default",
})  # fmt: skip
# Several values, none of which is a moved one: each `getitem` of theirs is an edge.
_TUPLES = frozenset({
    "var_mean.correction", "native_layer_norm.default", "native_group_norm.default", "lstm.input",
    "gru.input", "rnn_tanh.input", "rnn_relu.input",
})  # fmt: skip
_CONSTANTS = frozenset(
    name
    for name in OPERATORS
    if name.partition(".")[0]
    in {
        "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "arange", "new_zeros",
        "new_ones", "new_full", "scalar_tensor", "param",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Edge:
    """One value that is quantized where it arises.

    Attributes:
        name: name of the producing node.
        node: index of the node whose value is quantized: the producer, or the clamp fused into it.
        kind: "input", "inner", "output" or "partial". Of the last two the width is not searched:
            only the network's outputs read it, or it is one half of the sum that a layer and its
            residual give (`quant_ops.dual`), so it stays a wide integer with a scale.
    """

    name: str
    node: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Edges:
    edges: tuple[Edge, ...]
    of_node: tuple[str | None, ...]


def activation_edges(graph: Graph) -> tuple[Edge, ...]:
    """Every edge of the network, in execution order.

    Edges are: float inputs; values of convolutions, linear layers and embeddings; of add, sub,
    mul of tensors, concatenations, averages, and of every operator without an integer form. A
    clamp (relu, relu6, hardtanh, clamp) that is the only reader of a convolution, linear layer,
    add, sub, mul or channel affine map is part of it, and the value after it is quantized.
    Integers, truth values, sizes and values that do not depend on an edge have none.
    """
    return _found(graph).edges


def edge_of(graph: Graph, node_index: int) -> str | None:
    """Name of the edge that a node's value belongs to, None if it belongs to none."""
    return _found(graph).of_node[node_index]


def fused_clamp(graph: Graph, node_index: int) -> int | None:
    """Index of the clamp that is computed as part of this node, None if there is none."""
    node = graph.nodes[node_index]
    users = graph.consumers[node_index]
    if node.op not in FUSING or len(users) != 1 or Ref(node_index) in graph.outputs:
        return None
    user = graph.nodes[users[0]]
    has_refs = sum(1 for arg in user.args for _ in refs_in(arg)) > 1  # a bound that is computed
    return users[0] if user.op in FUSIBLE and not has_refs else None


def is_pass_through(graph: Graph, node_index: int) -> bool:
    """Whether the node only moves, drops or compares what its first argument holds."""
    node = graph.nodes[node_index]
    if node.op in PADS:
        return _pads_with_zero(node)
    if node.op == "getitem":
        source = node.args[0]
        assert isinstance(source, Ref)
        return graph.nodes[source.index].op in SPLITTING
    return node.op in PASS_THROUGH


def _pads_with_zero(node: Node) -> bool:
    if node.op == "constant_pad_nd.default":
        return len(node.args) < 3 or node.args[2] == 0
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    return mode == "constant" and value in (None, 0)


@per_graph
def _found(graph: Graph) -> _Edges:
    of_node: list[str | None] = [None] * len(graph.nodes)
    quantized_at: dict[str, int] = {}
    fused: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if not (node.dtype.startswith("float") or node.dtype == "bfloat16"):
            continue
        if index in fused or (is_pass_through(graph, index) and node.args):
            source = node.args[0]
            of_node[index] = of_node[source.index] if isinstance(source, Ref) else None
        elif _produces(node, of_node):
            of_node[index] = node.name
            clamp = fused_clamp(graph, index)
            fused |= set() if clamp is None else {clamp}
            quantized_at[node.name] = index if clamp is None else clamp
    kinds = _kinds(graph, of_node, fused)
    edges = tuple(Edge(name, node, kinds[name]) for name, node in quantized_at.items())
    return _Edges(edges, tuple(of_node))


def _produces(node: Node, of_node: list[str | None]) -> bool:
    if node.op == "input" or node.op in LAYER_OPS:
        return True
    if node.op in _CONSTANTS or node.op in _TUPLES:
        return False
    if node.op == "getitem":  # of an operator with several values
        return True
    return any(of_node[ref.index] is not None for arg in node.args for ref in refs_in(arg))


def _kinds(graph: Graph, of_node: list[str | None], fused: set[int]) -> Mapping[str, str]:
    """An edge is an output's if it reaches one and no operator but pass-throughs reads it."""
    outputs = {ref.index for ref in graph.outputs}
    reaches: set[str] = set()
    is_read: set[str] = set()
    kinds: dict[str, str] = {}
    for index, name in enumerate(of_node):
        if name is None:
            continue
        if graph.nodes[index].op == "input":
            kinds[name] = "input"
        if index in partial_nodes(graph):
            kinds[name] = "partial"
        if index in outputs:
            reaches.add(name)
        for user in graph.consumers[index]:
            if user not in fused and not is_pass_through(graph, user):
                is_read.add(name)
    for name in filter(None, of_node):
        is_output = name in reaches and name not in is_read
        kinds.setdefault(name, "output" if is_output else "inner")
    return kinds
