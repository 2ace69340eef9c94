"""A quantized model without the channels that its packed file does not hold."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused_layers
from quant_ops.graph import Layer, Params
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.removal import NOTHING, Removal, canonical_columns, plan_removal, remove_channels
from quant_ops.slots import Ids
from quant_ops.storage import prunes
from quant_ops.stored import StoredBias, StoredScale


def reduced_model(model: QuantizedModel) -> QuantizedModel:
    """The smaller network that computes the same: what a generated program should hold.

    Codes are equal. The unit of an output may be smaller: absent columns of mid-rise channels have
    no code for 0, and what a reader puts there counts in the proven range of the whole model.

    Names stay. A layer that loses input channels and has several scales per channel becomes a
    float layer, since groups of scales no longer cover equal numbers of weights.
    """
    model = without_unused_layers(model)
    removal = plan_removal(model.graph, model.candidate) if prunes(model.candidate) else NOTHING
    return _reduced(model, removal)


@dataclass(frozen=True, eq=False)
class Reduction:
    """A model and its reduced form, which can be trained in its place at less cost.

    Attributes:
        whole: the model.
        model: the reduced one.
        params: float parameters, cut to the reduced graph.
        removal: what was cut.
    """

    whole: QuantizedModel
    model: QuantizedModel
    params: Params
    removal: Removal = NOTHING

    @classmethod
    def of(cls, model: QuantizedModel, params: Params) -> "Reduction":
        """Of a model with the float parameters of its graph.

        Where a layer is a float layer, or would have to become one, and loses inputs, nothing
        is cut.
        """
        used = without_unused_layers(model)
        removal = plan_removal(used.graph, used.candidate) if prunes(used.candidate) else NOTHING
        reduced = _reduced(used, removal)
        cut_floats = {
            name
            for name, value in reduced.float_params.items()
            if name not in removal.params and value.shape != used.float_params[name].shape
        }
        if not removal or cut_floats or reduced.layers.keys() != used.layers.keys():
            return cls(model, model, params)
        _, cut = remove_channels(used.graph, params, removal)
        return cls(model, reduced, cut, removal)

    def widened(self, trained: QuantizedModel) -> QuantizedModel:
        """The whole model with what a trained reduced one holds put where it came from."""
        if not self.removal:
            return trained
        removal, graph = self.removal, self.whole.graph
        layers = {
            name: _widened(
                graph.layer_of[name], old, trained.layers[name],
                removal.rows.get(name), removal.columns.get(name),
            )
            for name, old in self.whole.layers.items()
            if name in trained.layers
        }  # fmt: skip
        floats = {}
        for name, old in self.whole.float_params.items():
            floats[name] = new = trained.float_params[name]
            if name in removal.params:
                axis, kept = removal.params[name]
                floats[name] = old.clone().index_copy(axis, torch.from_numpy(kept), new)
        return replace(
            self.whole,
            layers={**self.whole.layers, **layers},
            activations=trained.activations,
            float_params=floats,
        )


def _reduced(model: QuantizedModel, removal: Removal) -> QuantizedModel:
    if not removal:
        return model
    graph, params = remove_channels(model.graph, model.params(), removal)
    layers, quants = {}, {}
    floats: dict[str, Tensor] = {name: params[name] for name in model.float_params}
    for name, quantized in model.layers.items():
        layer = model.graph.layer_of[name]
        columns = removal.columns.get(name)
        if columns is not None and quantized.channel_scales().shape[1] > 1:
            floats |= {p: params[p] for p in (layer.weight, layer.bias) if p is not None}
            continue
        layers[name] = smaller = _smaller(layer, quantized, removal.rows.get(name), columns)
        old = model.candidate.assignment[name]
        quants[name] = LayerQuant(smaller.bit_widths, old.scheme, old.group_size)
    candidate = Candidate.of(quants, dict(model.candidate.activations))
    return replace(model, graph=graph, candidate=candidate, layers=layers, float_params=floats)


def _smaller(
    layer: Layer, quantized: QuantizedLayer, rows: Ids | None, columns: Ids | None
) -> QuantizedLayer:
    codes = quantized.codes
    if columns is not None:
        by_column = codes.reshape(layer.out_channels, canonical_columns(layer), -1)
        codes = by_column[:, columns].reshape(layer.out_channels, -1)
    if rows is None:
        return replace(quantized, codes=codes)
    widths = np.asarray(quantized.bit_widths)
    bias = quantized.bias
    return QuantizedLayer(
        tuple(widths[rows].tolist()),
        codes[rows],
        _kept_scales(quantized.scales, widths, rows),
        quantized.mid_rise,
        None if quantized.zero_points is None else quantized.zero_points[rows],
        None if bias is None else StoredBias(bias.base, bias.codes[rows]),
    )


def _kept_scales(
    scales: Mapping[float, StoredScale], widths: np.ndarray, rows: Ids
) -> dict[float, StoredScale]:
    kept = {}
    for width, stored in scales.items():
        of_width = np.flatnonzero(widths == width)
        staying = np.isin(of_width, rows)
        if staying.any():
            kept[width] = replace(stored, ratio=stored.ratio[staying])
    return kept


def _widened(
    layer: Layer,
    old: QuantizedLayer,
    trained: QuantizedLayer,
    rows: Ids | None,
    columns: Ids | None,
) -> QuantizedLayer:
    kept = np.arange(layer.out_channels) if rows is None else rows
    by_column = old.codes.reshape(layer.out_channels, canonical_columns(layer), -1).copy()
    every = np.arange(by_column.shape[1]) if columns is None else columns
    by_column[np.ix_(kept, every)] = trained.codes.reshape(len(kept), len(every), -1)
    zeros, bias = old.zero_points, old.bias
    if zeros is not None and trained.zero_points is not None:
        zeros = zeros.copy()
        zeros[kept] = trained.zero_points
    if bias is not None and trained.bias is not None:
        codes = np.zeros_like(bias.codes)  # of channels of width 0, which are all that is gone
        codes[kept] = trained.bias.codes
        bias = StoredBias(trained.bias.base, codes)
    return replace(
        old,
        codes=by_column.reshape(layer.out_channels, -1),
        scales=trained.scales,
        zero_points=zeros,
        bias=bias,
    )
