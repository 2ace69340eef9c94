"""Cuts a graph into consecutive blocks that hand exactly one value on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quant_ops.edges import fused_clamp
from quant_ops.graph import Graph, Node, Ref, map_refs, params_in, refs_in


@dataclass(frozen=True)
class Block:
    """Nodes `start` to `stop - 1` of a network, as a graph of their own.

    Attributes:
        graph: its inputs are `sources`, its outputs `targets`; layer names are those of the
            network.
        start, stop: node range in the network.
        sources: nodes of the network whose values enter: the block's input first, then sizes and
            constants that do not depend on the input's content.
        targets: nodes of the network whose values leave.
    """

    graph: Graph
    start: int
    stop: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the searchable layers inside."""
        return tuple(layer.name for layer in self.graph.searchable_layers)


def split_into_blocks(graph: Graph) -> tuple[Block, ...]:
    """The finest division into blocks of at least one searchable layer each, in order.

    A cut is where a single value that depends on the input's content goes on: between the
    residual blocks of a ResNet, between the layers of a chain. A clamp stays with the operator
    that it is fused into, and all sites of a layer stay in one block. A network without such a
    place, or without layers, is one block.
    """
    holders = [i for i, n in enumerate(graph.nodes) if _holds_layer(graph, i) and n.op != "input"]
    starts = [0]
    for cut in _cuts(graph):
        after = any(site >= cut for site in holders)
        if after and any(starts[-1] <= site < cut for site in holders):
            starts.append(cut)
    stops = [*starts[1:], len(graph.nodes)]
    return tuple(_block(graph, a, b) for a, b in zip(starts, stops, strict=True))


def joined(graph: Graph, blocks: Sequence[Block]) -> Block:
    """Consecutive blocks of `graph` as one."""
    if len(blocks) == 1:
        return blocks[0]
    return _block(graph, blocks[0].start, blocks[-1].stop)


def _holds_layer(graph: Graph, index: int) -> bool:
    layer = graph.layer_at.get(index)
    return layer is not None and layer.searchable


def _cuts(graph: Graph) -> list[int]:
    """Every index such that one content-dependent value alone is read from there on."""
    content = _depends_on_content(graph)
    last = [max(users, default=i) for i, users in enumerate(graph.consumers)]
    for ref in graph.outputs:
        last[ref.index] = len(graph.nodes)
    spans = [(min(x.sites), max(x.sites)) for x in graph.layers if x.sites]
    first = max(graph.input_nodes, default=-1) + 1
    return [
        cut
        for cut in range(first, len(graph.nodes))
        if sum(1 for i in range(cut) if content[i] and last[i] >= cut) == 1
        and not any(low < cut <= high for low, high in spans)
        and not _splits_pair(graph, cut)
    ]


def _splits_pair(graph: Graph, cut: int) -> bool:
    """Whether a clamp would be parted from its operator, or an operator from its several values."""
    return any(
        fused_clamp(graph, i) is not None
        or any(graph.nodes[user].op == "getitem" for user in graph.consumers[i])
        for i in range(cut)
        if max(graph.consumers[i], default=i) >= cut
    )


def _depends_on_content(graph: Graph) -> list[bool]:
    out: list[bool] = []
    for node in graph.nodes:
        reads = any(out[ref.index] for arg in node.args for ref in refs_in(arg))
        out.append(node.op == "input" or (node.dtype != "" and reads))
    return out


def _block(graph: Graph, start: int, stop: int) -> Block:
    content = _depends_on_content(graph)
    inside = range(start, stop)
    if start == 0:
        sources = list(graph.input_nodes)
    else:
        read = {ref.index for i in inside for a in graph.nodes[i].args for ref in refs_in(a)}
        read |= {ref.index for ref in graph.outputs} if stop == len(graph.nodes) else set()
        # the input first; a side value that is not read inside goes on from where it was
        sources = sorted((i for i in read if i < start), key=lambda i: (not content[i], i))
    last_outputs = tuple(ref.index for ref in graph.outputs)
    targets = last_outputs if stop == len(graph.nodes) else (_carried(graph, content, stop),)
    nodes = [
        Node("input", (), graph.nodes[i].name, graph.nodes[i].shape, graph.nodes[i].dtype)
        for i in sources
    ]
    index_map = {source: position for position, source in enumerate(sources)}
    for i in inside:
        if i in index_map:
            continue
        index_map[i] = len(nodes)
        args = tuple(map_refs(arg, index_map) for arg in graph.nodes[i].args)
        nodes.append(replace(graph.nodes[i], args=args))
    layers = tuple(
        replace(layer, sites=tuple(index_map[site] for site in layer.sites))
        for layer in graph.layers
        if layer.sites and all(start <= site < stop for site in layer.sites)
    )
    outputs = tuple(Ref(index_map[i]) for i in targets)
    used = _used_params(nodes)
    shapes = tuple((name, shape) for name, shape in graph.param_shapes if name in used)
    dtypes = tuple((name, dtype) for name, dtype in graph.param_dtypes if name in used)
    part = Graph(tuple(nodes), outputs, layers, shapes, dtypes)
    return Block(part, start, stop, tuple(sources), targets)


def _used_params(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(name for node in nodes for name in params_in(node.args))


def _carried(graph: Graph, content: list[bool], cut: int) -> int:
    """The one content-dependent value that is read from `cut` on."""
    outputs = {ref.index for ref in graph.outputs}
    (carried,) = (
        i
        for i in range(cut)
        if content[i] and (i in outputs or max(graph.consumers[i], default=i) >= cut)
    )
    return carried
