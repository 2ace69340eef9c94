"""Uniform quantizers: which integer code is nearest to a value, and what a code stands for.

All of them are one arithmetic: value = scale * (code + offset) with the code between two limits.
Mid-tread and affine have offset 0, mid-rise 1/2; affine codes are stored with the zero point
added. Rounding is exact: the nearest level in real arithmetic, in the sense of the float32 values
given, so that search, file and an integer reference agree to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_ops.bit_widths import LEVELS, TERNARY
from quant_ops.quantized import code_range

_CHUNK = 1 << 15  # elements: stays in the cache, and below where torch starts threads


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The levels (code + offset), low <= code <= high, in units of the scale.

    `low` and `high` are (rows, 1) tensors where zero points differ, else integers.
    """

    low: int | Tensor
    high: int | Tensor
    offset: float

    def rows(self, start: int, stop: int) -> "Levels":
        """The levels of some rows."""
        if isinstance(self.low, int) or isinstance(self.high, int):
            return self
        return Levels(self.low[start:stop], self.high[start:stop], self.offset)


def effective_scheme(bit_width: float, scheme: str) -> str:
    """The scheme in force: binary is always mid-rise, ternary mid-tread or affine.

    >>> effective_scheme(1, "mid_tread"), effective_scheme(1.6, "mid_rise")
    ('mid_rise', 'mid_tread')
    """
    if bit_width == 1:
        return "mid_rise"
    return "mid_tread" if bit_width == TERNARY else scheme


def levels_of(bit_width: float, scheme: str, zero_points: Tensor | None = None) -> Levels:
    """The levels of a quantizer.

    Args:
        bit_width: a legal width but 0.
        scheme: "mid_tread", "mid_rise" or "affine".
        zero_points: for the affine scheme, shape (rows, 1).
    """
    scheme = effective_scheme(bit_width, scheme)
    if scheme == "affine":
        if zero_points is None:
            raise ValueError("affine levels need zero points")
        return Levels(-zero_points, LEVELS[bit_width] - 1 - zero_points, 0.0)
    low, high = code_range(bit_width, scheme)
    return Levels(low, high, 0.5 if scheme == "mid_rise" else 0.0)


def grouped(weights: Tensor, group_size: int | None) -> Tensor:
    """(channels, n) -> (channels * groups, group_size): one row per scale.

    Raises:
        ValueError: the group size does not divide n.
    """
    n = weights.shape[1]
    if group_size is None or group_size >= n:
        return weights
    if n % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {n} weights of a channel")
    return weights.reshape(-1, group_size)


def nearest_codes(values: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """The code of the nearest level, int16, without zero point.

    Args:
        values: (rows, n), float.
        scale: (rows, 1) or broadcastable, positive.
        levels: ties go to the even code (offset 0), or away from 0 (offset 1/2), so that a
            mid-rise quantizer is odd: only 0 itself has to choose, and becomes +1/2.

    Raises:
        ValueError: a value or scale is NaN or infinite.
    """
    if not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(scale).all())):
        raise ValueError("cannot quantize NaN or infinite values")
    # Quotients of float32 numbers within 2^-33 of a tie are ties: float64 decides exactly.
    ratio = values.double() / scale.double()
    if levels.offset:
        codes = torch.floor(ratio.abs())
        codes = torch.where(ratio < 0, -1 - codes, codes)
    else:
        codes = torch.round(ratio)
    return _clamp(codes, levels.low, levels.high).to(torch.int16)


def _clamp(x: Tensor, low: int | float | Tensor, high: int | float | Tensor) -> Tensor:
    return torch.minimum(
        torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device)),
        torch.as_tensor(high, dtype=x.dtype, device=x.device),
    )


def quantize(
    values: Tensor,
    scale: Tensor,
    bit_width: float,
    scheme: str,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Codes as they are stored, int16, of the shape of `values`.

    Args:
        values: any shape.
        scale: broadcastable to `values`: one for the tensor, (channels, 1) per channel,
            (channels, groups, 1) for values of shape (channels, groups, group_size).
        bit_width: a legal width but 0.
        scheme: "mid_tread", "mid_rise" or "affine".
        zero_point: like `scale`, for the affine scheme.
    """
    codes = nearest_codes(values, scale, levels_of(bit_width, scheme, zero_point))
    if zero_point is not None and effective_scheme(bit_width, scheme) == "affine":
        codes = codes + zero_point.to(torch.int16)
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor,
    bit_width: float,
    scheme: str,
    zero_point: Tensor | None = None,
) -> Tensor:
    """The values that codes stand for, float32, one rounding each."""
    scheme = effective_scheme(bit_width, scheme)
    doubled = 2 * codes.int()
    if scheme == "affine":
        if zero_point is None:
            raise ValueError("affine codes need a zero point")
        doubled = doubled - 2 * zero_point.int()
    if scheme == "mid_rise":
        doubled = doubled + 1
    return doubled.float() * (scale.float() * 0.5)


def fake_quantize(
    values: Tensor,
    scale: Tensor,
    bit_width: float,
    scheme: str,
    zero_point: Tensor | None = None,
) -> Tensor:
    """The nearest representable values, float32. Applying it twice changes nothing."""
    codes = quantize(values, scale, bit_width, scheme, zero_point)
    return dequantize(codes, scale, bit_width, scheme, zero_point)


def squared_errors(
    rows: Tensor, scales: Tensor, levels: Levels, importance: Tensor | None = None
) -> Tensor:
    """Sum of squared quantization errors of each row at each candidate scale, float64.

    Args:
        rows: (rows, n) float32.
        scales: (candidates, rows), positive.
        levels: the quantizer's levels.
        importance: (rows, n) or (1, n) factors on the squared errors, or None for 1.

    Returns:
        (candidates, rows).
    """
    out = torch.empty(scales.shape, dtype=torch.float64)
    step = max(1, _CHUNK // max(1, scales.shape[0] * rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        stop = min(start + step, rows.shape[0])
        scale = scales[:, start:stop, None].to(rows.dtype)
        ratio = rows[start:stop] * scale.reciprocal()
        nearest = torch.floor(ratio).add_(0.5) if levels.offset else torch.round(ratio)
        part = levels.rows(start, stop)
        error = _clamp_(nearest, part).sub_(ratio).square_()
        if importance is not None:
            error *= importance if importance.shape[0] == 1 else importance[start:stop]
        out[:, start:stop] = error.sum(-1).double() * scale[..., 0].double().square()
    return out


def _clamp_(nearest: Tensor, levels: Levels) -> Tensor:
    if isinstance(levels.low, int) and isinstance(levels.high, int):
        return nearest.clamp_(levels.low + levels.offset, levels.high + levels.offset)
    return _clamp(nearest, levels.low, levels.high)
