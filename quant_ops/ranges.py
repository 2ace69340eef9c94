"""Range setters: the scale that a quantizer should have, from the values it will see.

Each setter takes rows (rows, n), one scale per row, and returns the wanted scales (rows,) in
float64, 0 for a row of zeros. The same functions serve weights (a row is a channel or a group)
and activations (one row of histogram centres, importance = counts).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant_ops.analytic_ranges import aciq_scale, sawb_knows, sawb_scale
from quant_ops.quantizers import Levels, levels_of, squared_errors
from quant_ops.stored import StoredScale, ratio_values

RangeSetter = Callable[[Tensor, Levels, Tensor | None], Tensor]

PERCENTILE = 0.999
_COARSE = 16
_FINE = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)  # of a coarse step
_TWN_THRESHOLD = 0.7


def minmax_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """The smallest scale that clips nothing."""
    return _scale_for(rows.amin(dim=1).double(), rows.amax(dim=1).double(), levels)


def percentile_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """Clips at most 0.1 % of the values (weighted by importance) on either side."""
    ordered, order = rows.sort(dim=1)
    weight = torch.ones_like(ordered) if importance is None else importance.expand_as(rows)
    total = weight.gather(1, order).double().cumsum(dim=1)
    edges = torch.tensor([1 - PERCENTILE, PERCENTILE], dtype=torch.float64) * total[:, -1:]
    position = torch.searchsorted(total, edges).clamp_max(rows.shape[1] - 1)
    low, high = ordered.gather(1, position).double().unbind(dim=1)
    scale = _scale_for(low, high, levels)
    # A row that is nearly all zeros keeps its few large values.
    return torch.where(scale > 0, scale, minmax_scale(rows, levels))


def mse_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """The scale of least squared error: a geometric grid of clip limits, then a finer one.

    The grid runs from clipping at the root mean square, below which no shape has its optimum,
    to no clipping at all: OMSE [Choukroun2019].
    """
    largest = minmax_scale(rows, levels)
    square = rows.double().square()
    if importance is None:
        rms = square.mean(dim=1).sqrt()
    else:
        weight = importance.double().expand_as(square)
        rms = ((square * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-300)).sqrt()
    least = _scale_for(-0.9 * rms, 0.9 * rms, levels)
    top = torch.where(largest > 0, largest, 1.0).log2()
    bottom = torch.minimum(torch.where(least > 0, least.log2(), top), top)
    stride = (top - bottom) / (_COARSE - 1)
    steps = torch.arange(_COARSE, dtype=torch.float64)[:, None]
    coarse = _best(rows, levels, importance, top - stride * steps)
    fine = coarse - stride * torch.tensor(_FINE, dtype=torch.float64)[:, None]
    return torch.where(largest > 0, torch.exp2(_best(rows, levels, importance, fine)), 0.0)


def twn_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """Ternary weights' closed form: mean |w| of those above 0.7 mean |w| [Li2016]."""
    magnitude = rows.abs().double()
    kept = magnitude > _TWN_THRESHOLD * magnitude.mean(dim=1, keepdim=True)
    return (magnitude * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


def mean_abs_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """Binary weights' optimum: levels at plus and minus mean |w| [Rastegari2016]."""
    magnitude = rows.abs().double()
    if importance is None:
        return 2 * magnitude.mean(dim=1)
    weight = importance.double().expand_as(magnitude)
    return 2 * (magnitude * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-300)


RANGE_SETTERS: dict[str, RangeSetter] = {
    "minmax": minmax_scale,
    "percentile": percentile_scale,
    "mse": mse_scale,
    "weighted_mse": mse_scale,  # by the mean square of the input that each weight meets
    "twn": twn_scale,
    "aciq": aciq_scale,
    "sawb": sawb_scale,
}


def weight_scales(
    rows: Tensor,
    bit_width: float,
    levels: Levels,
    range_setter: str = "mse",
    importance: Tensor | None = None,
) -> StoredScale:
    """The stored scales of weights, ratio of shape (rows,).

    The base comes from all rows, so that it does not depend on which of them are used. Least
    squared error is decided among the stored values themselves; binary is mean |w| always. "twn"
    applies to ternary and "sawb" to at most 16 symmetric levels, with "mse" for the others. The
    caller gives `importance` where errors are to be weighted.
    """
    if bit_width == 1:
        return StoredScale.nearest(mean_abs_scale(rows, levels, importance).numpy())
    is_ternary = levels_of(1.6, "mid_tread").high == levels.high
    if (range_setter == "twn" and not is_ternary) or (
        range_setter == "sawb" and not sawb_knows(levels)
    ):
        range_setter = "mse"
    wanted = _setter(range_setter)(rows, levels, importance)
    stored = StoredScale.nearest(wanted.numpy())
    if _setter(range_setter) is not mse_scale:
        return stored
    return _polished(rows, levels, importance, stored)


def zero_points(rows: Tensor, bit_width: float) -> Tensor:
    """Affine zero points (rows, 1), int64, such that the range of a row fits and 0 is a level."""
    low = rows.amin(dim=1, keepdim=True).double().clamp_max(0)
    high = rows.amax(dim=1, keepdim=True).double().clamp_min(0)
    share = torch.where(high > low, -low / (high - low).clamp_min(1e-300), 0.5)
    top = 2 if bit_width == 1.6 else 2 ** int(bit_width) - 1
    return torch.round(share * top).long()


def _setter(name: str) -> RangeSetter:
    if name not in RANGE_SETTERS:
        raise ValueError(f"range setter {name!r} is not one of {sorted(RANGE_SETTERS)}")
    return RANGE_SETTERS[name]


def _scale_for(low: Tensor, high: Tensor, levels: Levels) -> Tensor:
    """The least scale whose outermost levels reach `low` and `high`."""
    bottom, top = (
        (torch.as_tensor(end, dtype=torch.float64).flatten() + levels.offset).abs()
        for end in (levels.low, levels.high)
    )
    # An affine side without levels has no values either.
    negative = torch.where(bottom > 0, -low / bottom.clamp_min(0.25), 0.0)
    positive = torch.where(top > 0, high / top.clamp_min(0.25), 0.0)
    return torch.maximum(negative, positive).clamp_min(0)


def _best(rows: Tensor, levels: Levels, importance: Tensor | None, log_scales: Tensor) -> Tensor:
    errors = squared_errors(rows, torch.exp2(log_scales), levels, importance)
    return log_scales.gather(0, errors.argmin(dim=0, keepdim=True))[0]


def _polished(
    rows: Tensor, levels: Levels, importance: Tensor | None, stored: StoredScale
) -> StoredScale:
    ratio = torch.from_numpy(stored.ratio).long()
    tried = (ratio + torch.tensor([0, -1, 1])[:, None]).clamp(0, 255)
    scales = torch.from_numpy(ratio_values())[tried] * float(stored.base)
    best = squared_errors(rows, scales, levels, importance).argmin(dim=0, keepdim=True)
    return StoredScale(stored.base, tried.gather(0, best)[0].to(torch.uint8).numpy())
