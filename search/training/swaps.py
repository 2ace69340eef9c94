"""Widths moved by one step between channels in the middle of a training."""

import numpy as np
from numpy.typing import NDArray

from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.graph import Params
from quant_ops.learned_widths.size import with_widths
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.stored import StoredBias, StoredScale
from search.channel_widths import GroupTable, lagrangian, level_for
from search.prepare import Prepared
from search.training.trainable import Trainable


def swapped(
    trainable: Trainable, model: QuantizedModel, params: Params, limit_bytes: int
) -> QuantizedModel:
    """A trained network with one-bit swaps: some channels wider, others narrower.

    What a channel loses at its width and at the legal ones beside it is predicted from gradients
    of the trained network, as before a search from those of the float one; bytes then go where
    the loss falls most. Pruned channels stay pruned and none is added to them. Channels that keep
    their width keep codes and scales.

    Args:
        trainable: the task.
        model: the trained network as it would be packed.
        params: its float parameters.
        limit_bytes: largest packed file.
    """
    bank, calibration = trainable.bank(params)
    candidate = _moved(trainable.prepared, bank, model.candidate, limit_bytes)
    if candidate == model.candidate:
        return model
    rounded = trainable.rounded(bank, calibration, candidate)
    layers = {
        name: merged(model.layers[name], quantized) for name, quantized in rounded.layers.items()
    }
    return QuantizedModel(model.graph, candidate, layers, model.activations, model.float_params)


def merged(old: QuantizedLayer, new: QuantizedLayer) -> QuantizedLayer:
    """The channels whose width is the same from `old`, the others from `new`."""
    widths = np.asarray(new.bit_widths)
    kept = (np.asarray(old.bit_widths) == widths)[:, None]
    wanted = np.where(kept, old.channel_scales(), new.channel_scales())
    scales = {}
    for width, stored in new.scales.items():
        base = old.scales[width].base if width in old.scales else stored.base
        scales[width] = StoredScale.nearest_from(base, wanted[widths == width])
    zero_points, bias = new.zero_points, new.bias
    if old.zero_points is not None and zero_points is not None:
        zero_points = np.where(kept, old.zero_points, zero_points)
    if old.bias is not None and bias is not None:
        bias = StoredBias.nearest(np.where(kept[:, 0], old.bias.values, bias.values))
    codes = np.where(kept, old.codes, new.codes)
    return QuantizedLayer(new.bit_widths, codes, scales, new.mid_rise, zero_points, bias)


def _moved(
    prepared: Prepared, bank: WeightBank, candidate: Candidate, limit_bytes: int
) -> Candidate:
    """The candidate whose widths have moved by at most one legal step each."""
    space = prepared.space
    legal = {
        c.name: [b for b in c.bit_widths if b]
        for c in space.layers
        if not c.residual_of and c.name in candidate.assignment
    }
    legal = {name: widths for name, widths in legal.items() if len(widths) > 1}
    losses = prepared.evaluator.channel_losses(legal, bank=bank)
    tables: list[GroupTable] = []
    places: list[tuple[str, tuple[int, ...]]] = []
    for choice in space.layers:
        if choice.name not in legal:
            continue
        layer = space.graph.layer_of[choice.name]
        now = candidate.assignment[choice.name].per_channel(layer.out_channels)
        predicted, spread = losses[choice.name]
        for channels in choice.groups or (tuple(range(layer.out_channels)),):
            width = now[channels[0]]
            if width not in legal[choice.name] or len({now[c] for c in channels}) > 1:
                continue
            table = _around(legal[choice.name], width, predicted[list(channels)].sum(axis=0))
            bits = table[0] * layer.weights_per_channel * len(channels)
            deviation = float(np.sqrt(np.mean(spread[list(channels)] ** 2)))
            tables.append(GroupTable(*table, bits, deviation))
            places.append((choice.name, channels))

    def candidate_of(choice: list[int]) -> Candidate:
        widths = {n: list(candidate.assignment[n].per_channel(len(losses[n][1]))) for n in legal}
        for (name, channels), table, at in zip(places, tables, choice, strict=True):
            for channel in channels:
                widths[name][channel] = float(table.widths[at])
        return with_widths(candidate, {name: tuple(row) for name, row in widths.items()})

    size_of = prepared.costs["size_bytes"].cost
    found = level_for(
        lagrangian,
        tables,
        lambda picked: size_of(space.graph, candidate_of(list(picked))) <= limit_bytes,
    )
    return candidate if found is None else candidate_of(found)


def _around(
    legal: list[float], width: float, losses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The legal widths at most one step from `width`, and losses that do not rise with them."""
    at = legal.index(width)
    near = slice(max(0, at - 1), at + 2)
    return np.array(legal[near]), np.minimum.accumulate(losses)[near]
