"""Batch-norm folding: a norm after a convolution or linear layer becomes part of it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_ops.graph import Arg, Graph, Layer, Node, ParamRef, Params, Ref, map_refs, params_in
from quant_ops.layout import from_canonical, to_canonical

BATCH_NORMS = ("batch_norm.default", "_native_batch_norm_legit_no_training.default")


def fold_batch_norms(graph: Graph, params: Params) -> tuple[Graph, dict[str, Tensor]]:
    """Fold every batch norm that follows a layer used once, turn the others into affine maps.

    With scale = gamma / sqrt(var + eps) and shift = beta - scale * mean (per output channel):
    W' = scale * W, b' = scale * b + shift [Nagel2021, section 3.2]. A norm that cannot be folded
    becomes y = scale * x + shift with two stored vectors instead of four. Every searchable
    convolution and linear layer ends with a bias of its own, zero if it had none: bias
    correction needs the slot, and the packed size must not depend on the values.
    """
    params = dict(params)
    nodes: list[Node] = list(graph.nodes)
    forward: dict[int, int] = {}  # folded norm -> the layer node that now computes it
    for index, node in enumerate(graph.nodes):
        if node.op not in BATCH_NORMS:
            continue
        source = node.args[0]
        assert isinstance(source, Ref)
        scale, shift = _scale_and_shift(node, params)
        layer = graph.layer_at.get(source.index)
        if layer is not None and _foldable(graph, layer, source.index, index):
            _fold_into(layer, nodes, params, scale, shift)
            forward[index] = source.index
        else:
            nodes[index] = _as_affine(node, params, scale, shift)
    layers = _with_biases(graph.layers, nodes, params)
    return _rebuild(nodes, graph.outputs, layers, forward, params)


def norm_statistics(graph: Graph, params: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """What batch norms that will be folded say of their outputs.

    Returns:
        Layer name to (beta, |gamma|), each (out_channels,): mean and standard deviation of the
        layer's output with its norm, over the training data.
    """
    out = {}
    for index, node in enumerate(graph.nodes):
        source = node.args[0] if node.args else None
        if node.op not in BATCH_NORMS or not isinstance(source, Ref):
            continue
        layer = graph.layer_at.get(source.index)
        if layer is None or not _foldable(graph, layer, source.index, index):
            continue
        gamma, beta = (params[a.name] if isinstance(a, ParamRef) else None for a in node.args[1:3])
        ones = torch.ones(layer.out_channels)
        out[layer.name] = (
            torch.zeros_like(ones) if beta is None else beta.detach().clone(),
            ones if gamma is None else gamma.detach().abs(),
        )
    return out


def _scale_and_shift(node: Node, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    gamma, beta, mean, var = (
        params[a.name].double() if isinstance(a, ParamRef) else None for a in node.args[1:5]
    )
    assert mean is not None
    assert var is not None
    eps = float(node.args[7] if node.op == BATCH_NORMS[0] else node.args[6])  # type: ignore[arg-type]
    scale = (var + eps).rsqrt() * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - scale * mean
    return scale, shift


def _foldable(graph: Graph, layer: Layer, site: int, norm: int) -> bool:
    return (
        layer.searchable
        and layer.kind != "embedding"
        and layer.sites == (site,)
        and graph.consumers[site] == (norm,)
        and Ref(site) not in graph.outputs
        and not (layer.kind == "linear" and len(graph.nodes[site].shape) != 2)
    )


def _fold_into(
    layer: Layer, nodes: list[Node], params: dict[str, Tensor], scale: Tensor, shift: Tensor
) -> None:
    weight = params[layer.weight]
    canonical = to_canonical(layer, weight)
    shape = (-1,) + (1,) * (canonical.dim() - 1)
    folded = canonical.double() * scale.reshape(shape)
    params[layer.weight] = from_canonical(layer, folded.to(weight.dtype)).contiguous()
    site = layer.sites[0]
    node = nodes[site]
    bias = node.args[2] if len(node.args) > 2 else None
    old = params[bias.name].double() if isinstance(bias, ParamRef) else torch.zeros_like(shift)
    name = f"{layer.name}.bias"
    params[name] = (scale * old + shift).to(weight.dtype)
    nodes[site] = replace(node, args=_set_arg(node.args, 2, ParamRef(name)))


def _as_affine(node: Node, params: dict[str, Tensor], scale: Tensor, shift: Tensor) -> Node:
    names = (f"{node.name}.scale", f"{node.name}.shift")
    for name, value in zip(names, (scale, shift), strict=True):
        params[name] = value.float()
    args: tuple[Arg, ...] = (node.args[0], ParamRef(names[0]), ParamRef(names[1]), 1)
    return replace(node, op="bitfront.channel_affine", args=args)


def _with_biases(
    layers: tuple[Layer, ...], nodes: list[Node], params: dict[str, Tensor]
) -> tuple[Layer, ...]:
    out = []
    for layer in layers:
        sites = [s for s in layer.sites if nodes[s].op != "embedding.default"]
        if not layer.searchable or not sites:
            out.append(layer)
            continue
        bias = nodes[sites[0]].args[2] if len(nodes[sites[0]].args) > 2 else None
        if not isinstance(bias, ParamRef) or bias.name != f"{layer.name}.bias":
            old = params[bias.name] if isinstance(bias, ParamRef) else None
            bias = ParamRef(f"{layer.name}.bias")
            weight = params[layer.weight]
            params[bias.name] = (
                old.clone() if old is not None else weight.new_zeros(layer.out_channels)
            )
        for site in sites:
            nodes[site] = replace(nodes[site], args=_set_arg(nodes[site].args, 2, bias))
        out.append(replace(layer, bias=bias.name))
    return tuple(out)


def _set_arg(args: tuple[Arg, ...], position: int, value: Arg) -> tuple[Arg, ...]:
    padded = args + (None,) * (position + 1 - len(args))
    return (*padded[:position], value, *padded[position + 1 :])


def _rebuild(
    nodes: list[Node],
    outputs: tuple[Ref, ...],
    layers: tuple[Layer, ...],
    forward: dict[int, int],
    params: dict[str, Tensor],
) -> tuple[Graph, dict[str, Tensor]]:
    kept = [i for i in range(len(nodes)) if i not in forward]
    position = {old: new for new, old in enumerate(kept)}
    index_map = {i: position[forward.get(i, i)] for i in range(len(nodes))}
    new_nodes = tuple(
        replace(nodes[i], args=tuple(map_refs(a, index_map) for a in nodes[i].args)) for i in kept
    )
    new_layers = tuple(replace(x, sites=tuple(index_map[s] for s in x.sites)) for x in layers)
    new_outputs = tuple(Ref(index_map[ref.index]) for ref in outputs)
    used = dict.fromkeys(name for node in new_nodes for name in params_in(node.args))
    shapes = tuple((name, tuple(params[name].shape)) for name in used)
    dtypes = {name: str(params[name].dtype).removeprefix("torch.") for name in used}
    others = tuple((name, dtype) for name, dtype in dtypes.items() if dtype != "float32")
    graph = Graph(new_nodes, new_outputs, new_layers, shapes, others)
    return graph, {name: params[name] for name in used}
