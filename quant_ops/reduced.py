"""A quantized model without the channels that its packed file does not hold."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused_layers
from quant_ops.graph import Layer
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.removal import canonical_columns, plan_removal, remove_channels
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
    removal = plan_removal(model.graph, model.candidate) if prunes(model.candidate) else None
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
