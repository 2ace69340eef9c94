"""Codes and scales of two tensors whose sum stands for one."""

import torch
from torch import Tensor

from quant_ops.correction import rescaled
from quant_ops.graph import Layer
from quant_ops.layout import to_canonical
from quant_ops.quantized import QuantizedLayer
from quant_ops.rounding import grid_of, with_codes

TOLERANCE = 1e-4  # relative fall of the error below which alternation ends
_FACTOR_LIMITS = (0.5, 2.0)

Two = tuple[QuantizedLayer, QuantizedLayer]


def alternate(layer: Layer, two: Two, weights: Tensor, importance: Tensor | None = None) -> Two:
    """Lower sum(importance (W - a1 Q1 - a2 Q2)^2), scales and codes in turn [Choukroun2019].

    With the codes fixed both scales of a channel are its least squares, as far as stored scales
    go; with the scales fixed each tensor is rounded to what the other leaves. No step raises the
    error of any channel. Layers with groups of weights keep their scales.

    Args:
        layer: of the shape of both.
        two: where to start.
        weights: (out_channels, n).
        importance: (out_channels or 1, n), None for 1.
    """
    weights = weights.double()
    weighting = torch.ones(1, 1) if importance is None else importance
    weighting = weighting.double()
    error = float(channel_errors(layer, two, weights, weighting).sum())
    while True:
        two = _rounded(layer, _refitted(layer, two, weights, weighting), weights)
        after = float(channel_errors(layer, two, weights, weighting).sum())
        if after >= (1 - TOLERANCE) * error:
            return two
        error = after


def channel_errors(layer: Layer, two: Two, weights: Tensor, importance: Tensor) -> Tensor:
    """(out_channels,) sums of importance (W - a1 Q1 - a2 Q2)^2, float64."""
    first, second = (rows_of(layer, q) for q in two)
    return (importance * (weights - first - second).square()).sum(dim=1)


def rows_of(layer: Layer, quantized: QuantizedLayer) -> Tensor:
    """(out_channels, n) float64: what codes stand for."""
    return to_canonical(layer, quantized.weight(layer)).double().flatten(1)


def _rounded(layer: Layer, two: Two, weights: Tensor) -> Two:
    first, second = two
    first = _nearest(layer, first, weights - rows_of(layer, second))
    return first, _nearest(layer, second, weights - rows_of(layer, first))


def _nearest(layer: Layer, quantized: QuantizedLayer, wanted: Tensor) -> QuantizedLayer:
    """The codes nearest to `wanted` at the scales that are there."""
    grid = grid_of(layer, quantized)
    codes = grid.codes(wanted.reshape(layer.groups, -1, wanted.shape[1]))
    return with_codes(quantized, codes.reshape(wanted.shape))


def _refitted(layer: Layer, two: Two, weights: Tensor, importance: Tensor) -> Two:
    if any(q.channel_scales().shape[1] > 1 for q in two):
        return two
    before = channel_errors(layer, two, weights, importance)
    first, second = (rows_of(layer, q) for q in two)
    factors = _least_squares(first, second, weights, importance)
    after = channel_errors(layer, _scaled(two, factors), weights, importance)
    kept = torch.where((after < before)[:, None], factors, 1.0)
    moved = _scaled(two, kept)
    # a scale that outgrows its layer's base moves that base, and may cost the others a rounding
    worse = channel_errors(layer, moved, weights, importance) > before
    return two if bool(worse.any()) else moved


def _scaled(two: Two, factors: Tensor) -> Two:
    first, second = factors.numpy().T
    return rescaled(two[0], first), rescaled(two[1], second)


def _least_squares(first: Tensor, second: Tensor, wanted: Tensor, importance: Tensor) -> Tensor:
    """(rows, 2): factors f of least sum(importance (wanted - f1 first - f2 second)^2)."""
    a, b, c = (
        (importance * x * y).sum(dim=1)
        for x, y in ((first, first), (first, second), (second, second))
    )
    p, q = ((importance * x * wanted).sum(dim=1) for x in (first, second))
    determinant = a * c - b * b
    usable = determinant > 1e-9 * a * c
    safe = torch.where(usable, determinant, 1.0)
    factors = torch.stack([(c * p - b * q) / safe, (a * q - b * p) / safe], dim=1)
    return torch.where(usable[:, None], factors.clamp(*_FACTOR_LIMITS), 1.0)
