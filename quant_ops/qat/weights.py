"""Weight quantizers whose steps are learned or follow the weights, a bit width per channel."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from quant_ops.analytic_ranges import sawb_knows, sawb_scale
from quant_ops.bit_widths import LEVELS, TERNARY
from quant_ops.qat.grid import ScaleGrid
from quant_ops.quantized import QuantizedLayer, code_range
from quant_ops.quantizers import Levels, effective_scheme
from quant_ops.rounding import with_codes
from quant_ops.stored import StoredScale

RULES = ("lsq", "sawb", "twn", "ttq")
_TWN_THRESHOLD = 0.7  # of the mean magnitude [Li2016]
_TTQ_THRESHOLD = 0.05  # of the largest magnitude [Zhu2017]


class LearnedStep(nn.Module):
    """Latent weights to their nearest levels; the steps are learned with them [Esser2020].

    value = scale * (code + offset), code = clamp(round(w / step - offset)). The scale is the
    stored one nearest to the step once `on_grid` is set, so that what is trained is what is
    packed. Gradients: to w where it lies inside the range, to the step by the published formula.

    Differs from the paper: the logarithm of the step is learned, with a gradient such that a small
    step of gradient descent changes the step as in the paper. Binary weights keep a gradient
    up to twice their level, else half of them would never move.

    Other rules: "sawb" sets the steps of 3, 4, 7, 8, 15 or 16 symmetric levels from the weights'
    moments [Choi2018]; "twn" sets threshold and level of ternary weights from their mean
    magnitudes [Li2016]; "ttq" learns the level and takes the threshold from the largest weight
    [Zhu2017], with one level where the paper has two. What a rule does not cover learns its step.

    Args:
        quantized: the layer as it is stored at the start: widths, levels and scales.
        unit: (out_channels, 1) what a weight of 1 of the trained parameter stands for; gradients
            of steps are measured in it.
        rule: one of `RULES`.

    Attributes:
        log_step: (out_channels, groups) natural logarithm of the step, parameter.
        factor: (out_channels, 1) what a folded norm multiplies the values by.
        on_grid: whether the values lie on stored scales.
    """

    low: Tensor
    high: Tensor
    offset: Tensor
    live: Tensor
    factor: Tensor
    sharpness: Tensor
    by_rule: Tensor

    def __init__(
        self, quantized: QuantizedLayer, *, unit: Tensor | None = None, rule: str = "lsq"
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"weights must be quantized by one of {RULES}, got {rule!r}")
        self.rule = rule
        self.on_grid = True
        self._quantized = quantized
        widths = np.asarray(quantized.bit_widths)
        self._present = sorted(quantized.scales)
        scales = torch.from_numpy(quantized.channel_scales())
        live = torch.from_numpy(widths > 0)[:, None]
        self.log_step = nn.Parameter(torch.where(scales > 0, scales, 1.0).log())
        n = quantized.codes.shape[1] // scales.shape[1]
        low, high = _code_limits(quantized)
        top = torch.maximum(high.abs(), low.abs()).clamp_min(1)
        per_unit = torch.ones(len(widths), 1) if unit is None else unit
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        offsets = [0.5 if w in quantized.mid_rise else 0.0 for w in widths.tolist()]
        self.register_buffer("offset", torch.tensor(offsets)[:, None])
        self.register_buffer("live", live)
        self.register_buffer("factor", torch.ones(len(widths), 1))
        self.register_buffer("sharpness", per_unit.square() / (n * top).sqrt())
        self.register_buffer("by_rule", _covered(quantized, rule)[:, None])
        self._any_by_rule = bool(self.by_rule.any())
        bases = [float(quantized.scales[w].base) for w in self._present] or [1.0]
        self.grid = ScaleGrid(torch.tensor(bases), _positions_of(widths, self._present))

    @classmethod
    def from_weights(
        cls,
        weights: Tensor,
        bit_widths: Sequence[float],
        *,
        scheme: str = "mid_tread",
        rule: str = "lsq",
    ) -> Self:
        """Steps of 2 mean|w| / sqrt(largest code), the paper's start; no bias.

        Args:
            weights: (out_channels, n).
            bit_widths: one per output channel.
            scheme: "mid_tread" or "mid_rise"; binary is always mid-rise, ternary mid-tread.
            rule: one of `RULES`.
        """  # fmt: skip
        widths = np.asarray(bit_widths, dtype=float)
        present = [w for w in sorted(set(bit_widths)) if w]
        mid_rise = frozenset(w for w in present if effective_scheme(w, scheme) == "mid_rise")
        mean = weights.detach().abs().double().mean(dim=1, keepdim=True).clamp_min(1e-12)
        scales = {}
        for width in present:
            top = max(1.0, code_range(width, effective_scheme(width, scheme))[1] + 0.0)
            wanted = 2 * mean / math.sqrt(top)
            scales[width] = StoredScale.nearest(wanted.cpu().numpy()[widths == width])
        codes = np.zeros(tuple(weights.shape), np.int16)
        empty = QuantizedLayer(tuple(bit_widths), codes, scales, mid_rise, None, None)
        return cls(empty, rule=rule)

    def forward(self, weights: Tensor) -> Tensor:
        """(out_channels, n) the values the codes stand for. `weights`: the same shape."""
        step, scale = self._steps(weights)
        values: Tensor = _Quantize.apply(weights, self.log_step, step, scale, self)  # type: ignore[no-untyped-call]
        return values

    def codes(self, weights: Tensor) -> Tensor:
        """(out_channels, n) float32 codes without zero point."""
        with torch.no_grad():
            step, _ = self._steps(weights)
            rows = self.rows(weights)
            return self._nearest(rows, step.reshape(-1, 1)).reshape(weights.shape)

    def bit_widths(self) -> tuple[float, ...]:
        """One per output channel."""
        return self._quantized.bit_widths

    def mean_bits(self) -> Tensor:
        """(out_channels,) stored bits of a weight."""
        return torch.tensor(self._quantized.bit_widths)

    def stored(self, weights: Tensor) -> QuantizedLayer:
        """The layer as it is stored; the bias is that of the start."""
        with torch.no_grad():
            _, wanted = self._values_wanted(weights)
            scales = {
                width: self.grid.stored(wanted, position)
                for position, width in enumerate(self._present)
            }
        codes = self.codes(weights).double().cpu()
        return replace(with_codes(self._quantized, codes), scales=scales)

    def absorb(self, factor: Tensor) -> None:
        """Multiply the values by a positive `factor` (out_channels,); codes stay as they are."""
        with torch.no_grad():
            self.factor.mul_(factor[:, None])
            self.grid.rebase(torch.where(self.live, self.log_step.exp() * self.factor, 0.0))

    def rows(self, weights: Tensor) -> Tensor:
        """(out_channels * groups, weights that share a step)."""
        return weights.reshape(self.log_step.numel(), -1)

    def per_row(self, x: Tensor) -> Tensor:
        """(out_channels * groups, 1) a value per channel or group, one for each of `rows`."""
        return x.expand_as(self.log_step).reshape(-1, 1)

    def _nearest(self, rows: Tensor, step: Tensor) -> Tensor:
        codes = (rows / step - self.per_row(self.offset)).round_()
        return codes.clamp_(self.per_row(self.low), self.per_row(self.high))

    def _steps(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(out_channels, groups) twice: what codes are taken with, what they are worth."""
        with torch.no_grad():
            step, wanted = self._values_wanted(weights)
            scale = self.grid(wanted) if self.on_grid else wanted
            return step, torch.where(self.live, scale, 0.0)

    def _values_wanted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        step = value = self.log_step.exp()
        if self._any_by_rule:
            step, value = self._ruled(self.rows(weights), step)
        return step, torch.where(self.live, value * self.factor, 0.0)

    def _ruled(self, rows: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = rows.abs()
        if self.rule == "sawb":
            step = torch.ones_like(learned)
            for low, high in set(self._ranges()):
                found = sawb_scale(rows, Levels(low, high, 0.0)).float().reshape(step.shape)
                fits = (self.low == low) & (self.high == high)
                step = torch.where(fits, found, step)
            value = step
        else:
            share = _TWN_THRESHOLD if self.rule == "twn" else _TTQ_THRESHOLD
            size = magnitude.mean(dim=1) if self.rule == "twn" else magnitude.amax(dim=1)
            threshold = (share * size).clamp_min(1e-12)[:, None]
            above = (magnitude > threshold).float()
            mean = (magnitude * above).sum(dim=1) / above.sum(dim=1).clamp_min(1)
            step = (2 * threshold).reshape(learned.shape)
            value = mean.clamp_min(1e-12).reshape(learned.shape) if self.rule == "twn" else learned
        return tuple(torch.where(self.by_rule, x, learned) for x in (step, value))  # type: ignore[return-value]

    def _ranges(self) -> list[tuple[int, int]]:
        ends = torch.cat([self.low[:, :1], self.high[:, :1]], dim=1)[self.by_rule[:, 0]]
        return [(int(low), int(high)) for low, high in ends.tolist()]


class _Quantize(torch.autograd.Function):
    """Nearest levels forward; straight-through and learned-step gradients backward."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, log_step: Tensor, step: Tensor, scale: Tensor, of: LearnedStep
    ) -> Tensor:
        rows = of.rows(weights).float()
        step, scale = step.reshape(-1, 1), scale.reshape(-1, 1)
        codes = of._nearest(rows, step)
        ctx.save_for_backward(rows, codes, step, scale)
        ctx.of = of
        return ((codes + of.per_row(of.offset)) * scale).reshape(weights.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, codes, step, scale = ctx.saved_tensors
        of: LearnedStep = ctx.of
        offset = of.per_row(of.offset)
        levels = codes + offset
        at = rows / step
        low, high = of.per_row(of.low) + offset, of.per_row(of.high) + offset
        widened = (high - low == 1) * 0.5
        inside = (at >= low - widened) & (at <= high + widened)
        worth = of.rows(gradient.float()) * scale
        slope = torch.where(inside, levels - at, levels)
        learns = torch.ones_like(step)
        if of._any_by_rule:
            ruled = of.per_row(of.by_rule)
            slope = torch.where(ruled, levels, slope)
            learns = torch.where(ruled, float(of.rule == "ttq"), 1.0)
        value = of.log_step.detach().exp().reshape(-1, 1)
        by_step = (worth * slope).sum(dim=1, keepdim=True) / value.square() * learns
        by_step = by_step.reshape(of.log_step.shape) * of.sharpness
        by_weight = (worth * inside / step).reshape(gradient.shape)
        return by_weight, by_step, None, None, None


def _code_limits(quantized: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """(out_channels, groups or 1) smallest and largest code without zero point."""
    scheme = "mid_tread" if quantized.zero_points is None else "affine"
    ends = [code_range(w, scheme) if LEVELS[w] else (0, 0) for w in quantized.bit_widths]
    low, high = torch.tensor(ends, dtype=torch.float32).reshape(-1, 2, 1).unbind(dim=1)
    if quantized.zero_points is not None:
        zero = torch.from_numpy(quantized.zero_points).float()
        low, high = low - zero, high - zero
    return low, high


def _covered(quantized: QuantizedLayer, rule: str) -> Tensor:
    """(out_channels,) which channels the rule sets; those of the others are learned."""
    if rule == "lsq" or quantized.zero_points is not None:
        return torch.zeros(len(quantized.bit_widths), dtype=torch.bool)
    covered = {0.0: False}
    for width in quantized.scales:
        low, high = code_range(width, "mid_tread")
        known = sawb_knows(Levels(low, high, 0.5 if width in quantized.mid_rise else 0.0))
        covered[width] = known if rule == "sawb" else width == TERNARY
    return torch.tensor([covered[w] for w in quantized.bit_widths])


def _positions_of(widths: np.ndarray[Any, Any], present: Sequence[float]) -> Tensor:
    return torch.tensor([present.index(w) if w in present else -1 for w in widths.tolist()])
