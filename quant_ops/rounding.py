"""Second-order rounding: codes that minimise the error of a layer's output, not of its weights.

The squared output error of a row of weights is (q - w)^T H (q - w), with H the second moment of
the inputs. One H serves every width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bit_widths import LEVELS
from quant_ops.calibration import Calibration
from quant_ops.channels import live_inputs
from quant_ops.correction import corrected_bias, rescaled
from quant_ops.dual import live_pairs
from quant_ops.graph import Layer, Params
from quant_ops.layout import to_canonical
from quant_ops.moments import InputMoments
from quant_ops.quantized import QuantizedLayer, QuantizedModel, code_range
from quant_ops.stored import StoredBias

DAMPING = 0.003  # of the mean diagonal of H: what calibration data never excite counts a little
SWEEPS = 6
REFITS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values scale * (code + offset), low <= code <= high, of rows of weights.

    All tensors are float64 and broadcast to (groups, rows, n). Affine levels are given without
    their zero point, as -zero_point <= code.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor

    def codes(self, values: Tensor, at: Tensor | None = None) -> Tensor:
        """Codes of the nearest levels; `at` (groups, 1, 1) picks a column for each group."""
        scale = self.scale if at is None else _columns(self.scale, at)
        ratio = values / scale
        nearest = torch.where(self.offset > 0, torch.floor(ratio), torch.round(ratio))
        return torch.minimum(torch.maximum(nearest, self.low), self.high)

    def values(self, codes: Tensor, at: Tensor | None = None) -> Tensor:
        """What codes stand for."""
        scale = self.scale if at is None else _columns(self.scale, at)
        return scale * (codes + self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Codes of a layer, and the real numbers whose nearest levels they are.

    Attributes:
        codes: (groups, rows, n), without zero point, float64.
        wanted: (groups, rows, n) the value each weight would best take, all others as they are.
    """

    codes: Tensor
    wanted: Tensor


def cholesky_rounding(weights: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Codes by rounding one column after the other, the rest making up for it [Frantar2023].

    Args:
        weights: (groups, rows, n) float64.
        grid: the levels.
        hessian: (groups, n, n) float64, symmetric, positive definite.

    Returns:
        (groups, rows, n). With H a multiple of the identity: nearest rounding.
    """
    n = weights.shape[2]
    # Columns that matter most go first: later ones can make up for them.
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rows = order[:, :, None].expand(-1, -1, n)
    ordered = hessian.gather(1, rows).gather(2, order[:, None].expand(-1, n, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work = weights.gather(2, order[:, None].expand_as(weights)).clone()
    codes = torch.empty_like(work)
    for j in range(n):
        at = order[:, j, None, None]
        column = work[:, :, j : j + 1]
        codes[:, :, j : j + 1] = grid.codes(column, at)
        error = (column - grid.values(codes[:, :, j : j + 1], at)) / upper[:, j, j, None, None]
        work[:, :, j + 1 :] -= error * upper[:, j, None, j + 1 :]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


def coordinate_descent(
    weights: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Codes that no change of a single one improves, and the values they are nearest to.

    Each step sets one column to its optimum given all others, so that the error never rises.

    Returns:
        codes and wanted values, (groups, rows, n) each.
    """
    codes = codes.clone()
    gradient = (grid.values(codes) - weights) @ hessian
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    column_of = torch.zeros(weights.shape[0], 1, 1, dtype=torch.long)
    for _ in range(sweeps):
        changed = False
        for j in range(weights.shape[2]):
            at = column_of + j
            now = grid.values(codes[:, :, j : j + 1], at)
            wanted = now - gradient[:, :, j : j + 1] / diagonal[:, j, None, None]
            better = grid.codes(wanted, at)
            change = grid.values(better, at) - now
            if bool(change.any()):
                changed = True
                codes[:, :, j : j + 1] = better
                gradient += change * hessian[:, j, None]
        if not changed:
            break
    return codes, grid.values(codes) - gradient / diagonal[:, None]


def output_error(weights: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """(groups, rows): (q - w)^T H (q - w)."""
    change = values - weights
    return ((change @ hessian) * change).sum(dim=2)


def round_layer(
    layer: Layer,
    quantized: QuantizedLayer,
    weight: Tensor,
    moments: InputMoments,
    *,
    live: NDArray[np.bool_] | None = None,
    refits: int = REFITS,
) -> tuple[QuantizedLayer, Tensor]:
    """The layer with second-order codes, and the (out_channels, n) values they are nearest to.

    The better of nearest and Cholesky rounding, then coordinate descent: never worse on the
    moments than what was given. Pruned channels, zero points and the bias stay.

    Args:
        layer: the layer.
        quantized: codes and stored scales to start from.
        weight: the float weight, in the operator's own layout.
        moments: of the layer's input.
        live: (in_channels,) False where the input is removed and its weight thus of no effect.
        refits: how often the scales are set to their optimum for the codes (as far as stored
            scales go) and the codes to theirs for the scales; 0 keeps the scales. Layers with
            groups of weights keep theirs.
    """
    hessian = moments.second if layer.bias is None else moments.covariance
    hessian = _damped(_masked(layer, hessian, live))
    shape = (layer.groups, layer.out_channels // layer.groups, layer.weights_per_channel)
    weights = to_canonical(layer, weight).double().reshape(shape)
    grid = grid_of(layer, quantized)
    start = signed_codes(quantized).reshape(shape)
    best = _descend(weights, start, grid, hessian)
    if quantized.channel_scales().shape[1] > 1:
        refits = 0
    for _ in range(refits):
        moved = _refitted(quantized, weights, grid.values(best.codes), hessian)
        new_grid = grid_of(layer, moved)
        again = _descend(weights, best.codes, new_grid, hessian)
        before, after = (
            float(output_error(weights, g.values(b.codes), hessian).sum())
            for g, b in ((grid, best), (new_grid, again))
        )
        if after >= before:
            break
        quantized, grid, best = moved, new_grid, again
    rows = (layer.out_channels, layer.weights_per_channel)
    return with_codes(quantized, best.codes.reshape(rows)), best.wanted.reshape(rows)


def round_pair(
    layer: Layer,
    two: tuple[QuantizedLayer, QuantizedLayer],
    weight: Tensor,
    moments: InputMoments,
    *,
    live: NDArray[np.bool_] | None = None,
    refits: int = REFITS,
) -> tuple[tuple[QuantizedLayer, QuantizedLayer], tuple[Tensor, Tensor]]:
    """`round_layer` for a layer and the residual beside it, each to what the other leaves.

    Args:
        layer: the main layer, whose bias absorbs the mean error of both.
        two: codes and stored scales of main and residual layer.
        weight: the float weight that their sum stands for.
        moments: of the input of both.
        live: as in `round_layer`.
        refits: as in `round_layer`.
    """
    first, second = two
    first, wanted = round_layer(
        layer, first, weight - second.weight(layer), moments, live=live, refits=refits
    )
    second, left = round_layer(
        layer, second, weight - first.weight(layer), moments, live=live, refits=refits
    )
    return (first, second), (wanted, left)


def round_model(
    model: QuantizedModel,
    params: Params,
    moments: Mapping[str, InputMoments],
    calibration: Calibration | None = None,
    *,
    refits: int = REFITS,
) -> QuantizedModel:
    """`round_layers` without the real weights."""
    return round_layers(model, params, moments, calibration, refits=refits)[0]


def round_layers(
    model: QuantizedModel,
    params: Params,
    moments: Mapping[str, InputMoments],
    calibration: Calibration | None = None,
    *,
    refits: int = REFITS,
) -> tuple[QuantizedModel, dict[str, Tensor]]:
    """Every layer with second-order codes, and the real weights that they are nearest to.

    Args:
        model: where to start: its scales, its codes.
        params: the float parameters.
        moments: layer name to moments; layers without any stay as they are.
        calibration: means, so that biases absorb the mean error that is left; without it biases
            stay.
        refits: as in `round_layer`.

    Returns:
        The model, and layer name to (out_channels, n).
    """
    masks = {}
    if any(0 in quant.bit_widths for _, quant in model.candidate.layers):
        masks = dict(live_inputs(model.graph, model.candidate))
    layers, wanted = dict(model.layers), {}
    together = live_pairs(model)
    for name in model.layers:
        if name not in moments or name in {pair.residual for pair in together.values()}:
            continue
        layer, live = model.graph.layer_of[name], masks.get(name)
        weight, pair = params[layer.weight], together.get(name)
        if pair is None:
            layers[name], wanted[name] = round_layer(
                layer, layers[name], weight, moments[name], live=live, refits=refits
            )
        else:
            two = (layers[name], layers[pair.residual])
            two, both = round_pair(layer, two, weight, moments[name], live=live, refits=refits)
            layers |= {name: two[0], pair.residual: two[1]}
            wanted |= {name: both[0], pair.residual: both[1]}
        if calibration is not None:
            residual = None if pair is None else layers[pair.residual]
            layers[name] = rebiased(layer, layers[name], params, calibration, live, residual)
    return replace(model, layers=layers), wanted


def rebiased(
    layer: Layer,
    quantized: QuantizedLayer,
    params: Params,
    calibration: Calibration,
    live: NDArray[np.bool_] | None = None,
    residual: QuantizedLayer | None = None,
) -> QuantizedLayer:
    """The layer with the bias that keeps the mean output of every channel.

    Of a layer that a residual is added to: of the sum.
    """
    if layer.bias is None or layer.name not in calibration.tap_mean:
        return quantized
    weight = quantized.weight(layer)
    wanted = corrected_bias(
        layer,
        params[layer.bias],
        to_canonical(layer, params[layer.weight]),
        to_canonical(layer, weight if residual is None else weight + residual.weight(layer)),
        calibration.tap_mean[layer.name],
        live,
    )
    pruned = np.asarray(quantized.bit_widths) == 0
    return replace(quantized, bias=StoredBias.nearest(np.where(pruned, 0.0, wanted.numpy())))


def grid_of(layer: Layer, quantized: QuantizedLayer) -> Grid:
    """The levels of every weight, as (groups, rows, n) or (groups, rows, 1)."""
    widths = quantized.bit_widths
    affine = quantized.zero_points is not None
    scheme = "affine" if affine else "mid_tread"
    ends = np.array([code_range(w, scheme) if LEVELS[w] else (0, 0) for w in widths], float)
    scales = torch.from_numpy(quantized.channel_scales()).double()
    scales[scales == 0] = 1.0  # a pruned channel: its only level is 0
    low, high = torch.from_numpy(ends).unbind(dim=1)
    low, high = low[:, None], high[:, None]
    offset = torch.tensor([0.5 if w in quantized.mid_rise else 0.0 for w in widths])[:, None]
    if quantized.zero_points is not None:
        zero = torch.from_numpy(quantized.zero_points).double()
        low, high = low - zero, high - zero
    shape = (layer.groups, layer.out_channels // layer.groups, -1)
    per_scale = layer.weights_per_channel // scales.shape[1]

    def spread(x: Tensor) -> Tensor:
        wide = x if x.shape[1] == 1 else x.repeat_interleave(per_scale, dim=1)
        return wide.double().reshape(shape)

    return Grid(spread(scales), spread(low), spread(high), spread(offset))


def signed_codes(quantized: QuantizedLayer) -> Tensor:
    """(out_channels, n) codes without zero point, float64."""
    offset = np.isin(np.asarray(quantized.bit_widths), list(quantized.mid_rise))
    return torch.from_numpy((quantized.doubled_codes() - offset[:, None]) / 2)


def with_codes(quantized: QuantizedLayer, codes: Tensor) -> QuantizedLayer:
    """The layer with other codes, given without zero point; pruned channels stay 0."""
    whole = codes.round().numpy().astype(np.int16)
    if quantized.zero_points is not None:
        per_scale = whole.shape[1] // quantized.zero_points.shape[1]
        whole = whole + quantized.zero_points.repeat(per_scale, axis=1)
    whole[np.asarray(quantized.bit_widths) == 0] = 0
    return replace(quantized, codes=whole)


def _descend(weights: Tensor, start: Tensor, grid: Grid, hessian: Tensor) -> Rounded:
    """Coordinate descent from the best of what is given and Cholesky rounding, row by row."""
    tried = cholesky_rounding(weights, grid, hessian)
    start = torch.minimum(torch.maximum(start, grid.low), grid.high)
    errors = [output_error(weights, grid.values(codes), hessian) for codes in (start, tried)]
    codes = torch.where((errors[1] < errors[0])[:, :, None], tried, start)
    return Rounded(*coordinate_descent(weights, codes, grid, hessian))


def _refitted(
    quantized: QuantizedLayer, weights: Tensor, values: Tensor, hessian: Tensor
) -> QuantizedLayer:
    """The layer with every channel's scale at its optimum for its codes, as stored."""
    bent = values @ hessian
    power = (bent * values).sum(dim=2)
    factor = torch.where(power > 0, (bent * weights).sum(dim=2) / power.clamp_min(1e-300), 1.0)
    factors = factor.clamp(0.5, 2.0).flatten().numpy()
    return rescaled(quantized, factors)


def _damped(hessian: Tensor) -> Tensor:
    """H with a little more on its diagonal, so that it is positive definite."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    more = torch.where(mean > 0, DAMPING * mean, 1.0)
    return hessian + torch.diag_embed(more.expand(-1, hessian.shape[1]))


def _masked(layer: Layer, hessian: Tensor, live: NDArray[np.bool_] | None) -> Tensor:
    if live is None:
        return hessian
    mask = torch.from_numpy(live).double().reshape(layer.groups, -1)
    mask = mask.repeat_interleave(layer.weights_per_channel // mask.shape[1], dim=1)
    return hessian * mask[:, :, None] * mask[:, None, :]


def _columns(x: Tensor, at: Tensor) -> Tensor:
    """(groups, rows, 1): column `at` of each group; x itself where it has only one."""
    return x if x.shape[2] == 1 else x.gather(2, at.expand(-1, x.shape[1], 1))
