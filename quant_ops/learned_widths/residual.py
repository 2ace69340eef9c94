"""A weight as a sum of ever finer parts, each kept or dropped by a gate."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_ops.learned_widths.base import LearnedWidths, straight_through
from quant_ops.learned_widths.grids import best_grid


class ResidualWidths(LearnedWidths):
    """g_0 p_0 + g_1 p_1 + ..., with p_i what the i-th step size adds to the sum before it.

    p_i = s_i clamp(round((w - p_0 - .. - p_(i-1)) / s_i), -m_i, m_i), so every prefix of the sum
    is the rounding of w to the multiples of s_i. Rounding is passed straight through: p_0 has
    the gradient of w inside its range, the later ones none, as what one gains the next loses.

    Subclasses say what the parts are (`ratios`, `limits`) and how gates come about. `choices`
    are 0 (where legal) and the width up to each part.

    Attributes:
        log_range: (out,) natural logarithm of the largest value.
    """

    first: int

    @classmethod
    @abstractmethod
    def ratios(cls, parts: Sequence[float]) -> list[int]:
        """s_(i-1) / s_i of every part but the first."""

    @classmethod
    @abstractmethod
    def limits(cls, parts: Sequence[float]) -> list[int]:
        """m_i of every part."""

    @abstractmethod
    def range_in_steps(self) -> float:
        """The largest value over the first step size."""

    @abstractmethod
    def soft_gates(self) -> Tensor:
        """(groups, parts) between 0 and 1; each multiplies its part."""

    @abstractmethod
    def kept(self) -> Tensor:
        """(groups, parts) how much of the stored bits of each part is expected; falls along a row.

        The first is 1 where 0 is not legal.
        """

    def start(self, weight: Tensor) -> None:
        """Ranges of least squared error at the starting widths, and the subclass's gates."""
        self.first = int(self.choices[0] == 0)
        self.parts = self.choices[self.first :]
        largest = torch.zeros(len(weight))
        per_row = self.chosen[self.group_of].clamp_min(self.parts[0])
        ratios = [1, *self.ratios(self.parts)]
        for at, width in enumerate(self.parts):
            rows = per_row == self.choice_values[self.first + at]
            if rows.any():
                step = best_grid(weight[rows], width, schemes=("mid_tread",))[1]
                largest[rows] = step * self.range_in_steps() * math.prod(ratios[: at + 1])
        self.log_range = nn.Parameter(largest.log())
        self.start_gates()

    @abstractmethod
    def start_gates(self) -> None:
        """Create the parameters of the gates, open up to `chosen`."""

    def terms(self, weight: Tensor) -> list[Tensor]:
        """The parts p_i, each (out, n), without gates."""
        largest = self.log_range.exp()[:, None]
        x = torch.minimum(torch.maximum(weight, -largest), largest)
        step = largest / self.range_in_steps()
        ratios, limits = [1, *self.ratios(self.parts)], self.limits(self.parts)
        out: list[Tensor] = []
        for ratio, limit in zip(ratios, limits, strict=True):
            step = step / ratio
            digit = x / step
            code = digit.detach().round().clamp(-limit, limit)
            part = straight_through(code, digit) * step
            out.append(part)
            x = x - part
        return out

    def soft(self, weight: Tensor) -> Tensor:
        """The gated sum."""
        return self._sum(weight, self.soft_gates()[self.group_of])

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The sum of the parts up to each row's width."""
        parts = self.choice_values[self.first :]
        return self._sum(weight, (widths[:, None] >= parts).to(weight.dtype))

    def _sum(self, weight: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(weight)
        for at, part in enumerate(self.terms(weight)):
            out = out + gates[:, at, None] * part
        return out

    def expected_bits(self) -> Tensor:
        """Sum over parts of kept x the bits that the part adds."""
        parts = self.choice_values[self.first :]
        return self.kept() @ torch.diff(parts, prepend=parts.new_zeros(1))

    def live(self) -> Tensor:
        """How much of the first part is expected."""
        return super().live() if self._is_frozen else self.kept()[self.group_of, 0]

    def open_parts(self) -> Tensor:
        """(groups, parts) of 1 and 0: the parts that `chosen` has."""
        return (self.chosen[:, None] >= self.choice_values[self.first :]).float()

    def widths_with(self, is_open: Tensor) -> Tensor:
        """(groups,) the width up to the last part before the first closed gate (groups, parts)."""
        count = is_open.long().cumprod(dim=1).sum(dim=1)
        if not self.first:
            count = count.clamp_min(1) - 1
        return self.choice_values[count]
