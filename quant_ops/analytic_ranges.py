"""Clip limits from moments alone: ACIQ [Banner2019] and SAWB [Choi2018].

Both assume a shape of the distribution instead of trying scales, so that they need one pass over
the values. The forms are those of `quant_ops.ranges`: rows (rows, n) in, scales (rows,) out.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

from quant_ops.quantizers import Levels

_optimize: Any = optimize  # scipy carries no types
_special: Any = special

# E|x| / sqrt(E x^2) of the two shapes that ACIQ knows
_LAPLACE_RATIO = np.sqrt(0.5)
_GAUSS_RATIO = np.sqrt(2 / np.pi)
# number of levels to (c1, c2): clip = c1 * sqrt(E w^2) + c2 * E|w|
_SAWB = {
    3: (2.52, -1.6),
    4: (3.12, -2.064),
    7: (6.949, -6.304),
    8: (7.509, -6.892),
    15: (11.84, -11.82),
    16: (12.68, -12.80),
}


def aciq_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """The analytic clip of least squared error for a Laplace or a Gauss shape [Banner2019].

    The shape is the one whose E|x| / rms is nearer to the row's. Levels on one side of 0 stand
    for rectified values: moments are then taken of the positive ones, whose halved distribution
    has twice as many levels. Departures: both shapes are centred at 0, which is a level, and no
    clip lies beyond the largest magnitude.
    """
    weight = torch.ones_like(rows) if importance is None else importance.expand_as(rows)
    magnitude, one_sided = rows.abs().double(), _one_sided(levels)
    weight = weight.double() * ((magnitude > 0) if one_sided else 1)
    total = weight.sum(dim=1).clamp_min(1e-300)
    mean = (weight * magnitude).sum(dim=1) / total
    rms = ((weight * magnitude.square()).sum(dim=1) / total).sqrt()
    ratio = mean / rms.clamp_min(1e-300)
    n = _count(levels) * (2 if one_sided else 1)
    laplace, gauss = (
        torch.as_tensor(np.vectorize(clip)(np.atleast_1d(n.numpy())), dtype=torch.float64)
        for clip in (laplace_clip, gauss_clip)
    )
    is_laplace = (ratio - _LAPLACE_RATIO).abs() < (ratio - _GAUSS_RATIO).abs()
    clip = torch.where(is_laplace, laplace * mean, gauss * rms)
    clip = torch.minimum(clip, magnitude.amax(dim=1))
    return 2 * clip / n


def sawb_scale(rows: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """Statistics-aware clip: a fitted sum of root mean square and mean magnitude [Choi2018].

    The outermost of the symmetric levels lie at the clip; a clip that is not positive becomes
    the largest magnitude. `importance` is ignored, as in the paper.

    Raises:
        ValueError: the constants for so many levels are not known, see `sawb_knows`.
    """
    if not sawb_knows(levels):
        raise ValueError("statistics-aware clips are known for 3, 4, 7, 8, 15 and 16 levels")
    n = int(_count(levels))
    first, second = _SAWB[n]
    magnitude = rows.abs().double()
    clip = first * magnitude.square().mean(dim=1).sqrt() + second * magnitude.mean(dim=1)
    clip = torch.where(clip > 0, clip, magnitude.amax(dim=1))
    return 2 * clip / (n - 1)


def sawb_knows(levels: Levels) -> bool:
    """Whether there are constants for these levels: symmetric or nearly so, at most 16."""
    n = _count(levels)
    return n.numel() == 1 and int(n) in _SAWB and not _one_sided(levels)


@cache
def laplace_clip(n_levels: int) -> float:
    """Optimal clip of a Laplace distribution in units of E|x|: a e^a = 3 n^2 [Banner2019].

    >>> round(laplace_clip(4), 2), round(laplace_clip(16), 2)
    (2.83, 5.03)
    """
    return float(_special.lambertw(3.0 * n_levels**2).real)


@cache
def gauss_clip(n_levels: int) -> float:
    """Optimal clip of a Gauss distribution in standard deviations [Banner2019].

    >>> round(gauss_clip(4), 2), round(gauss_clip(16), 2)
    (1.71, 2.56)
    """

    def error(clip: float) -> float:
        outside = (1 + clip**2) * _special.erfc(clip / np.sqrt(2))
        edge = np.sqrt(2 / np.pi) * clip * np.exp(-(clip**2) / 2)
        return float(outside - edge + clip**2 / (3 * n_levels**2))

    found = _optimize.minimize_scalar(error, bounds=(0.1, 12), options={"xatol": 1e-9})
    return float(found.x)


def _count(levels: Levels) -> Tensor:
    """How many levels there are: (), or (rows,) where zero points differ."""
    n: Tensor = torch.as_tensor(levels.high) - torch.as_tensor(levels.low) + 1
    return n.flatten() if n.ndim else n


def _one_sided(levels: Levels) -> bool:
    return bool((torch.as_tensor(levels.low) + levels.offset >= 0).all())
