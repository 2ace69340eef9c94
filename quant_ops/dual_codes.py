"""Codes and scales of two tensors whose sum stands for one [Choukroun2019].

Departure: codes are rounded jointly, to the best of all sums, and not each tensor in turn; and
beside the greedy start there is a nested one, in which the residual's levels divide a step of the
first. Taking turns from the greedy start ends with up to twice the error.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quant_ops.bit_widths import LEVELS
from quant_ops.correction import rescaled
from quant_ops.graph import Layer
from quant_ops.layout import to_canonical
from quant_ops.quantized import QuantizedLayer, code_range
from quant_ops.quantizers import Levels, effective_scheme
from quant_ops.ranges import mse_scale
from quant_ops.rounding import Grid, grid_of, with_codes
from quant_ops.stored import StoredScale

TOLERANCE = 1e-4  # relative fall of the error below which alternation ends
_FACTOR_LIMITS = (0.5, 2.0)

Two = tuple[QuantizedLayer, QuantizedLayer]


def sum_codes(
    layer: Layer, greedy: Two, weights: Tensor, importance: Tensor | None, scheme: str
) -> Two:
    """The better of what `alternate` makes of the greedy and of the nested start.

    Args:
        layer: of the shape of both.
        greedy: the layer alone, and the range setter's residual of what that leaves.
        weights: (out_channels, n).
        importance: (out_channels or 1, n) factors on squared errors, None for 1.
        scheme: of the candidate; "auto" leaves the nested start its mid-rise levels.
    """
    found = alternate(layer, greedy, weights, importance)
    start = nested(layer, greedy, weights, importance, scheme)
    if start is None:
        return found
    other = alternate(layer, start, weights, importance)
    errors = [float(channel_errors(layer, t, weights, importance).sum()) for t in (found, other)]
    return other if errors[1] < errors[0] else found


def alternate(layer: Layer, two: Two, weights: Tensor, importance: Tensor | None = None) -> Two:
    """Lower sum(importance (W - a1 Q1 - a2 Q2)^2), scales and codes in turn.

    With the codes fixed both scales of a channel are its least squares, as far as stored scales
    go; with the scales fixed the codes are the nearest sum. No step raises the error of any
    channel. Layers with groups of weights keep their scales and round each tensor in turn.
    """
    two = _rounded(layer, two, weights)
    error = float(channel_errors(layer, two, weights, importance).sum())
    while True:
        two = _rounded(layer, _refitted(layer, two, weights, importance), weights)
        after = float(channel_errors(layer, two, weights, importance).sum())
        if after >= (1 - TOLERANCE) * error:
            return two
        error = after


def nested(
    layer: Layer, two: Two, weights: Tensor, importance: Tensor | None, scheme: str
) -> Two | None:
    """One fine uniform quantizer split in two: a1 = (levels of Q2) a2, at its scale of least error.

    None where widths differ between channels, zero points move the levels, or channels have
    several scales.
    """
    widths = [set(q.bit_widths) for q in two]
    grouped = any(q.channel_scales().shape[1] > 1 for q in two)
    if scheme == "affine" or grouped or any(len(w) > 1 or 0 in w for w in widths):
        return None
    (first,), (second,) = widths
    schemes = [
        effective_scheme(w, "mid_rise" if scheme == "auto" else scheme) for w in (first, second)
    ]
    ends = [
        np.array(code_range(w, s)) + (0.5 if s == "mid_rise" else 0.0)
        for w, s in zip((first, second), schemes, strict=True)
    ]
    low, high = (LEVELS[second] * ends[0] + ends[1]).tolist()
    levels = Levels(math.floor(low), math.floor(high), low - math.floor(low))
    fine = mse_scale(weights.float(), levels, importance).numpy()[:, None]
    out = [
        replace(
            q,
            scales={w: StoredScale.nearest(fine * factor)},
            mid_rise=frozenset({w} if s == "mid_rise" else ()),
        )
        for q, w, s, factor in zip(two, (first, second), schemes, (LEVELS[second], 1), strict=True)
    ]
    return out[0], out[1]


def channel_errors(
    layer: Layer, two: Two, weights: Tensor, importance: Tensor | None = None
) -> Tensor:
    """(out_channels,) sums of importance (W - a1 Q1 - a2 Q2)^2, float64."""
    first, second = (rows_of(layer, q) for q in two)
    square = (weights.double() - first - second).square()
    return (square if importance is None else importance.double() * square).sum(dim=1)


def rows_of(layer: Layer, quantized: QuantizedLayer) -> Tensor:
    """(out_channels, n) float64: what codes stand for."""
    return to_canonical(layer, quantized.weight(layer)).double().flatten(1)


def _rounded(layer: Layer, two: Two, weights: Tensor) -> Two:
    if any(q.channel_scales().shape[1] > 1 for q in two):
        first = _nearest(layer, two[0], weights.double() - rows_of(layer, two[1]))
        return first, _nearest(layer, two[1], weights.double() - rows_of(layer, first))
    grids = [_flat(grid_of(layer, q)) for q in two]
    codes = [torch.zeros(weights.shape, dtype=torch.float64) for _ in two]
    kinds = torch.cat([part for g in grids for part in (g.low, g.high, g.offset)], dim=1)
    for kind in torch.from_numpy(np.unique(kinds.numpy(), axis=0)):
        rows = (kinds == kind).all(dim=1)
        found = _nearest_sums(
            weights[rows].double(), [g.scale[rows] for g in grids], kind.reshape(2, 3).tolist()
        )
        for mine, part in zip(codes, found, strict=True):
            mine[rows] = part
    return with_codes(two[0], codes[0]), with_codes(two[1], codes[1])


def _nearest_sums(
    weights: Tensor, scales: list[Tensor], ends: list[list[float]]
) -> tuple[Tensor, Tensor]:
    """Codes (rows, n) of both tensors whose sum is nearest to each weight."""
    first, second = (torch.arange(low, high + 1, dtype=torch.float64) for low, high, _ in ends)
    sums = (scales[0] * (first + ends[0][2]))[:, :, None]
    sums = (sums + (scales[1] * (second + ends[1][2]))[:, None, :]).flatten(1)
    ordered, order = sums.sort(dim=1)
    middle = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    picked = order.gather(1, torch.searchsorted(middle, weights.contiguous()))
    return first[picked // len(second)], second[picked % len(second)]


def _flat(grid: Grid) -> Grid:
    """A grid of one scale per channel, (out_channels, 1) each."""
    return Grid(*(x.reshape(-1, 1) for x in (grid.scale, grid.low, grid.high, grid.offset)))


def _nearest(layer: Layer, quantized: QuantizedLayer, wanted: Tensor) -> QuantizedLayer:
    """The codes nearest to `wanted` at the scales that are there."""
    grid = grid_of(layer, quantized)
    codes = grid.codes(wanted.reshape(layer.groups, -1, wanted.shape[1]))
    return with_codes(quantized, codes.reshape(wanted.shape))


def _refitted(layer: Layer, two: Two, weights: Tensor, importance: Tensor | None) -> Two:
    if any(q.channel_scales().shape[1] > 1 for q in two):
        return two
    before = channel_errors(layer, two, weights, importance)
    factors = _least_squares(layer, two, weights.double(), importance)
    after = channel_errors(layer, _scaled(two, factors), weights, importance)
    moved = _scaled(two, torch.where((after < before)[:, None], factors, 1.0))
    # a scale that outgrows its layer's base moves that base, and may cost others a rounding
    worse = channel_errors(layer, moved, weights, importance) > before
    return two if bool(worse.any()) else moved


def _scaled(two: Two, factors: Tensor) -> Two:
    first, second = factors.numpy().T
    return rescaled(two[0], first), rescaled(two[1], second)


def _least_squares(layer: Layer, two: Two, wanted: Tensor, importance: Tensor | None) -> Tensor:
    """(out_channels, 2): factors f of least sum(importance (wanted - f1 first - f2 second)^2)."""
    first, second = (rows_of(layer, q) for q in two)
    weighting = torch.ones(1, 1) if importance is None else importance.double()

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (weighting * x * y).sum(dim=1)

    a, b, c = product(first, first), product(first, second), product(second, second)
    p, q = product(first, wanted), product(second, wanted)
    determinant = a * c - b * b
    usable = determinant > 1e-9 * a * c
    safe = torch.where(usable, determinant, 1.0)
    factors = torch.stack([(c * p - b * q) / safe, (a * q - b * p) / safe], dim=1)
    return torch.where(usable[:, None], factors.clamp(*_FACTOR_LIMITS), 1.0)
