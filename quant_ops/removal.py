"""Structural removal: the smaller network that is left when channels of width 0 are gone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.channels import ChannelAnalysis, analyse, zero_atoms
from quant_ops.graph import Graph, Layer, Params, Shape
from quant_ops.layout import from_canonical, to_canonical
from quant_ops.rewriting import rewrite
from quant_ops.slots import Ids

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Removal:
    """What leaves a network. Layers and parameters that lose nothing are not mentioned.

    Attributes:
        rows: layer name to the output channels that remain; its bias loses the same ones.
        columns: layer name to the positions on the canonical input axis that remain. Layers with
            groups lose rows only: a group goes as a whole.
        params: name of another float parameter to (axis, positions that remain).
        removed: per set of tied channels whether it leaves; sets as `analyse` numbers them.
    """

    rows: Mapping[str, Ids]
    columns: Mapping[str, Ids]
    params: Mapping[str, tuple[int, Ids]]
    removed: Mask

    def __bool__(self) -> bool:
        return bool(self.rows)

    def n_rows(self, layer: Layer) -> int:
        """Output channels of a layer that remain."""
        kept = self.rows.get(layer.name)
        return layer.out_channels if kept is None else kept.size

    def n_weights(self, layer: Layer) -> int:
        """Weights of a layer that remain."""
        kept = self.columns.get(layer.name)
        per_row = layer.weights_per_channel
        if kept is not None:
            per_row = per_row // canonical_columns(layer) * kept.size
        return self.n_rows(layer) * per_row


NOTHING = Removal({}, {}, {}, np.zeros(0, np.bool_))


def canonical_columns(layer: Layer) -> int:
    """Length of the canonical input axis: input channels of one group."""
    if layer.kind == "conv_transpose":
        return layer.weight_shape[0] // layer.groups
    return layer.weight_shape[1]


def plan_removal(graph: Graph, candidate: Candidate) -> Removal:
    """What leaves the network under `candidate`.

    A set of tied channels leaves when all of them have width 0, none is pinned, and every value
    keeps at least one channel: of a value that would lose all, the set of its first stays.
    """
    zero = zero_atoms(graph, candidate)
    if zero is None:
        return NOTHING
    analysis = analyse(graph)
    atoms = analysis.component[: zero.size]
    removed = np.zeros(analysis.n_components, np.bool_)
    removed[atoms] = True
    removed[atoms[~zero]] = False
    removed[0] = False
    _keep_one_channel(analysis, removed)
    if not removed.any():
        return NOTHING
    return _removal(graph, analysis, removed)


def _keep_one_channel(analysis: ChannelAnalysis, removed: Mask) -> None:
    flat, starts = analysis.value_vectors
    while flat.size:
        empty = np.logical_and.reduceat(removed[flat], starts)
        if not empty.any():
            return
        removed[flat[starts[empty.argmax()]]] = False


def _removal(graph: Graph, analysis: ChannelAnalysis, removed: Mask) -> Removal:
    gone = removed[analysis.component]
    rows, columns = {}, {}
    for layer in graph.layers:
        start, stop = analysis.atom_range[layer.name]
        if gone[start:stop].any():
            rows[layer.name] = np.flatnonzero(~gone[start:stop])
        if layer.groups == 1 and layer.name in analysis.layer_inputs:
            lost = gone[analysis.layer_inputs[layer.name][0]]
            if lost.any():
                columns[layer.name] = np.flatnonzero(~lost)
    params = {
        name: (axis, np.flatnonzero(~gone[slots]))
        for name, (axis, slots) in analysis.maps.params.items()
        if gone[slots].any()
    }
    return Removal(rows, columns, params, removed)


def remove_channels(
    graph: Graph, params: Params, removal: Removal
) -> tuple[Graph, dict[str, Tensor]]:
    """The smaller network and its parameters; names stay.

    Where the removed channels' weights and biases are 0 it computes what `graph` computes.
    """
    if not removal:
        return graph, dict(params)
    kept = dict(params)
    layers = tuple(_smaller_layer(layer, removal) for layer in graph.layers)
    for layer, smaller in zip(graph.layers, layers, strict=True):
        if smaller is not layer:
            kept[layer.weight] = _cut_weight(layer, smaller, params[layer.weight], removal)
        if layer.bias is not None and layer.name in removal.rows:
            kept[layer.bias] = params[layer.bias][torch.from_numpy(removal.rows[layer.name])]
    for name, (axis, positions) in removal.params.items():
        kept[name] = params[name].index_select(axis, torch.from_numpy(positions))
    shapes = tuple((name, tuple(kept[name].shape)) for name, _ in graph.param_shapes)
    layers = tuple(_with_shape(layer, tuple(kept[layer.weight].shape)) for layer in layers)
    gone = removal.removed[analyse(graph).component]
    return rewrite(
        replace(graph, layers=layers, param_shapes=shapes), analyse(graph).maps, gone
    ), kept


def _smaller_layer(layer: Layer, removal: Removal) -> Layer:
    if layer.name not in removal.rows and layer.name not in removal.columns:
        return layer
    out_channels = removal.n_rows(layer)
    groups = layer.groups * out_channels // layer.out_channels if layer.groups > 1 else 1
    macs = layer.macs // layer.n_weights * removal.n_weights(layer)
    return replace(layer, out_channels=out_channels, groups=groups, macs=macs)


def _with_shape(layer: Layer, shape: Shape) -> Layer:
    out_channels = shape[0] if layer.kind == "other" else layer.out_channels
    return replace(layer, weight_shape=shape, out_channels=out_channels)


def _cut_weight(layer: Layer, smaller: Layer, weight: Tensor, removal: Removal) -> Tensor:
    canonical = to_canonical(layer, weight)
    if layer.name in removal.rows:
        canonical = canonical[torch.from_numpy(removal.rows[layer.name])]
    if layer.name in removal.columns:
        canonical = canonical[:, torch.from_numpy(removal.columns[layer.name])]
    return from_canonical(smaller, canonical).contiguous()
