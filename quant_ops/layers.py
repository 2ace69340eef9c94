"""Finds the layers of a list of nodes: every weight tensor and the operators that use it."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from quant_ops.graph import Layer, Node, ParamRef, Ref, Shape, params_in
from quant_ops.operators import CONV, CONV_TRANSPOSE, EMBEDDING, LAYER_OPS, LINEAR


def find_layers(nodes: Sequence[Node], params: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    """Every weight of two or more dimensions, in order of first use."""
    sites: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        weight = _weight_of(node)
        if weight is not None:
            sites.setdefault(weight, []).append(index)
        for name in params_in(node.args):
            if name != weight and params[name].is_floating_point() and params[name].dim() >= 2:
                others.setdefault(name, []).append(index)
    layers = [_layer(nodes, params, w, s, others.pop(w, [])) for w, s in sites.items()]
    layers += [_float_layer(nodes, params, w, s) for w, s in others.items()]
    return tuple(sorted(layers, key=lambda layer: layer.sites[0]))


def _weight_of(node: Node) -> str | None:
    if node.op not in LAYER_OPS:
        return None
    weight = node.args[0] if node.op in EMBEDDING else node.args[1]
    return weight.name if isinstance(weight, ParamRef) else None


def _bias_of(node: Node) -> str | None:
    if node.op in EMBEDDING or len(node.args) < 3:
        return None
    bias = node.args[2]
    return bias.name if isinstance(bias, ParamRef) else None


def _layer(
    nodes: Sequence[Node],
    params: Mapping[str, Tensor],
    weight: str,
    sites: list[int],
    elsewhere: list[int],
) -> Layer:
    first = nodes[next((s for s in sites if nodes[s].op not in EMBEDDING), sites[0])]
    kinds = {_kind(nodes[s]) for s in sites}
    shape = tuple(params[weight].shape)
    kind = _kind(first)
    groups = _groups(first)
    biases = {_bias_of(nodes[s]) for s in sites if nodes[s].op not in EMBEDDING}
    reason = ""
    if elsewhere:
        reason = f"operator {nodes[elsewhere[0]].op} also reads its weight"
    elif len(biases) > 1:
        reason = "its weight is shared by calls with different biases"
    elif len(kinds - {"embedding"}) > 1:
        reason = f"its weight is shared by different operators ({', '.join(sorted(kinds))})"
    elif not params[weight].is_floating_point():
        reason = "its weight is not floating point"
    return Layer(
        name=weight.removesuffix(".weight"),
        kind=kind,
        weight=weight,
        bias=next(iter(biases), None),
        sites=tuple(sites),
        weight_shape=shape,
        out_channels=shape[1] * groups if kind == "conv_transpose" else shape[0],
        groups=groups,
        macs=sum(_macs(nodes, s, shape) for s in sites),
        searchable=not reason,
        reason=reason,
    )


def _float_layer(
    nodes: Sequence[Node], params: Mapping[str, Tensor], weight: str, sites: list[int]
) -> Layer:
    shape = tuple(params[weight].shape)
    op = nodes[sites[0]].op
    return Layer(
        name=weight.removesuffix(".weight"),
        kind="other",
        weight=weight,
        bias=None,
        sites=tuple(sites),
        weight_shape=shape,
        out_channels=shape[0],
        groups=1,
        macs=0,
        searchable=False,
        reason=f"operator {op.split('.')[0]} runs in float",
    )


def _kind(node: Node) -> str:
    if node.op in CONV:
        return "conv"
    if node.op in CONV_TRANSPOSE:
        return "conv_transpose"
    return "linear" if node.op in LINEAR else "embedding"


def _groups(node: Node) -> int:
    position = 6  # of conv(x, w, b, stride, padding, dilation, groups) and of
    # conv_transpose(x, w, b, stride, padding, output_padding, groups, dilation) alike
    if node.op not in CONV | CONV_TRANSPOSE or len(node.args) <= position:
        return 1
    groups = node.args[position]
    assert isinstance(groups, int)
    return groups


def _macs(nodes: Sequence[Node], site: int, weight_shape: Shape) -> int:
    node = nodes[site]
    if node.op in EMBEDDING:
        return 0
    if node.op in CONV_TRANSPOSE:
        source = node.args[0]
        assert isinstance(source, Ref)
        positions = math.prod(nodes[source.index].shape[2:])
        return positions * math.prod(weight_shape)
    if node.op in LINEAR:
        return math.prod(node.shape[:-1]) * math.prod(weight_shape)
    return math.prod(node.shape[2:]) * math.prod(weight_shape)
