"""A layer as the sum of two: beside it a residual layer holds what its low-bit codes leave.

W ~ a1 Q1 + a2 Q2 [Choukroun2019] as a graph: a parallel layer of the same shape on the same input,
and an addition. Its float weights are 0, so that the float network stays what it is. The addition
has its factor of 1 written out, which a captured network never has: that marks the pair, in files
too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.graph import Arg, Graph, Layer, Node, ParamRef, Params, Ref, map_refs, params_in
from quant_ops.operators import EMBEDDING, LAYER_OPS
from quant_ops.per_graph import per_graph
from quant_ops.quantized import QuantizedModel

SUFFIX = ".residual"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers whose values are only added to each other.

    Attributes:
        main: name of the layer that has the bias, if any.
        residual: name of the layer that is 0 in the float network.
        sites: for each call the nodes of main layer, residual layer and sum.
    """

    main: str
    residual: str
    sites: tuple[tuple[int, int, int], ...]


@per_graph
def pairs(graph: Graph) -> tuple[Pair, ...]:
    """Every pair, in order of the main layers."""
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for index in range(len(graph.nodes)):
        terms = _terms(graph, index)
        if terms is not None:
            names = (graph.layer_at[terms[0]].name, graph.layer_at[terms[1]].name)
            found.setdefault(names, []).append((*terms, index))
    out = []
    for (main, residual), sites in found.items():
        layers = graph.layer_of[main], graph.layer_of[residual]
        mine = [tuple(site[at] for site in sites) for at in (0, 1)]
        if main != residual and mine == [layers[0].sites, layers[1].sites]:
            out.append(Pair(main, residual, tuple(sites)))
    return tuple(out)


def _terms(graph: Graph, index: int) -> tuple[int, int] | None:
    """The calls that a marked addition adds up, if they are of one kind and on one input."""
    node = graph.nodes[index]
    if node.op != "add.Tensor" or len(node.args) != 3 or node.args[2] != 1:
        return None
    terms = [arg.index for arg in node.args[:2] if isinstance(arg, Ref)]
    if len(set(terms)) < 2 or any(graph.consumers[t] != (index,) for t in terms):
        return None
    if any(t not in graph.layer_at or Ref(t) in graph.outputs for t in terms):
        return None
    main, residual = (graph.nodes[t] for t in terms)
    alike = main.op == residual.op and main.op in LAYER_OPS - EMBEDDING
    same = main.args[:1] + main.args[3:] == residual.args[:1] + residual.args[3:]
    has_bias = len(residual.args) > 2 and residual.args[2] is not None
    return (terms[0], terms[1]) if alike and same and not has_bias else None


@per_graph
def residual_of(graph: Graph) -> dict[str, str]:
    """Main layer to residual layer."""
    return {pair.main: pair.residual for pair in pairs(graph)}


@per_graph
def main_of(graph: Graph) -> dict[str, str]:
    """Residual layer to main layer."""
    return {pair.residual: pair.main for pair in pairs(graph)}


@per_graph
def partial_nodes(graph: Graph) -> frozenset[int]:
    """Nodes whose values are one half of a sum: accumulators, not values to be quantized."""
    return frozenset(site for pair in pairs(graph) for sites in pair.sites for site in sites[:2])


def can_have_residual(graph: Graph, layer: Layer) -> bool:
    """Whether a residual layer can be put beside a layer."""
    return layer.searchable and all(graph.nodes[s].op not in EMBEDDING for s in layer.sites)


def with_residuals(
    graph: Graph, params: Params, names: Collection[str]
) -> tuple[Graph, dict[str, Tensor]]:
    """The network with a residual layer `NAME.residual` beside each of some layers.

    Outputs stay. A sum takes the name of the call that it completes, so that edges keep theirs.
    """
    chosen = {site: graph.layer_of[name] for name in names for site in graph.layer_of[name].sites}
    nodes: list[Node] = []
    new: dict[int, int] = {}
    sites: dict[str, list[int]] = {}

    def append(node: Node, layer: str) -> Ref:
        sites.setdefault(layer, []).append(len(nodes))
        nodes.append(node)
        return Ref(len(nodes) - 1)

    for index, node in enumerate(graph.nodes):
        moved = replace(node, args=tuple(map_refs(a, new) for a in node.args))
        if index in chosen:
            name = chosen[index].name
            main = append(replace(moved, name=f"{node.name}.main"), name)
            residual = append(_residual_call(moved, name), name + SUFFIX)
            moved = replace(node, op="add.Tensor", args=(main, residual, 1))
        new[index] = len(nodes)
        nodes.append(moved)
    layers: list[Layer] = []
    for layer in graph.layers:
        here = sites[layer.name] if layer.name in names else [new[site] for site in layer.sites]
        layers.append(replace(layer, sites=tuple(here)))
        if layer.name in names:
            layers.append(_residual_layer(layer, sites[layer.name + SUFFIX]))
    outputs = tuple(Ref(new[ref.index]) for ref in graph.outputs)
    added = {_weight(name): graph.layer_of[name] for name in names}
    shapes = tuple((weight, layer.weight_shape) for weight, layer in added.items())
    known = dict(graph.param_dtypes)
    dtypes = tuple((w, known[layer.weight]) for w, layer in added.items() if layer.weight in known)
    wider = Graph(
        tuple(nodes),
        outputs,
        tuple(layers),
        graph.param_shapes + shapes,
        graph.param_dtypes + dtypes,
    )
    zeros = {weight: torch.zeros_like(params[layer.weight]) for weight, layer in added.items()}
    return wider, {**params, **zeros}


def _weight(name: str) -> str:
    return f"{name}{SUFFIX}.weight"


def _residual_call(node: Node, name: str) -> Node:
    rest: tuple[Arg, ...] = (None, *node.args[3:]) if len(node.args) > 3 else ()
    args = (node.args[0], ParamRef(_weight(name)), *rest)
    return replace(node, name=f"{node.name}{SUFFIX}", args=args)


def _residual_layer(layer: Layer, sites: Sequence[int]) -> Layer:
    name = layer.name + SUFFIX
    return replace(layer, name=name, weight=_weight(layer.name), bias=None, sites=tuple(sites))


def without_unused(graph: Graph, candidate: Candidate) -> tuple[Graph, Candidate]:
    """Network and candidate without the residual layers that are 0 as a whole.

    What a file holds, what costs are counted of, what integer arithmetic runs: a residual layer
    that is not used costs nothing. Values stay: x + 0 = x.
    """
    if not pairs(graph):
        return graph, candidate
    assignment, edges = candidate.assignment, candidate.activation_bits
    unused = frozenset(
        pair.residual
        for pair in pairs(graph)
        if pair.residual in assignment
        and assignment[pair.residual].uniform == 0
        and not any(graph.nodes[node].name in edges for site in pair.sites for node in site[:2])
    )
    if not unused:
        return graph, candidate
    known = _shorter(graph)
    if unused not in known:
        known[unused] = _without(graph, unused)
    layers = tuple(item for item in candidate.layers if item[0] not in unused)
    return known[unused], Candidate(layers, candidate.activations)


def without_unused_layers(model: QuantizedModel) -> QuantizedModel:
    """The model without the residual layers that are 0 as a whole."""
    graph, candidate = without_unused(model.graph, model.candidate)
    if graph is model.graph:
        return model
    layers = {name: model.layers[name] for name, _ in candidate.layers}
    return replace(model, graph=graph, candidate=candidate, layers=layers)


def live_pairs(model: QuantizedModel) -> dict[str, Pair]:
    """Main layer to its pair, for pairs of quantized layers whose residual is in use."""
    return {
        pair.main: pair
        for pair in pairs(model.graph)
        if {pair.main, pair.residual} <= model.layers.keys()
        and any(model.layers[pair.residual].bit_widths)
    }


@per_graph
def _shorter(graph: Graph) -> dict[frozenset[str], Graph]:
    return {}


def _without(graph: Graph, unused: frozenset[str]) -> Graph:
    sites = [site for pair in pairs(graph) if pair.residual in unused for site in pair.sites]
    left_out = {node for site in sites for node in site[1:]}
    name_of = {main: graph.nodes[total].name for main, _, total in sites}
    main_at = {total: main for main, _, total in sites}
    nodes: list[Node] = []
    new: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        if index in main_at:
            new[index] = new[main_at[index]]
        if index in left_out:
            continue
        new[index] = len(nodes)
        args = tuple(map_refs(a, new) for a in node.args)
        nodes.append(replace(node, name=name_of.get(index, node.name), args=args))
    layers = tuple(
        replace(layer, sites=tuple(new[site] for site in layer.sites))
        for layer in graph.layers
        if layer.name not in unused
    )
    used = {name for node in nodes for arg in node.args for name in params_in(arg)}
    return Graph(
        tuple(nodes),
        tuple(Ref(new[ref.index]) for ref in graph.outputs),
        layers,
        tuple(item for item in graph.param_shapes if item[0] in used),
        tuple(item for item in graph.param_dtypes if item[0] in used),
    )
