"""FracBits: a width between two legal ones is the mixture of both quantizers."""

import torch
from torch import Tensor, nn

from quant_ops.learned_widths.base import LearnedWidths, bounded, nearest
from quant_ops.learned_widths.grids import StepGrids


class FracBits(LearnedWidths):
    """(1 - t) Q_narrow(w) + t Q_wide(w), t the width's place between its neighbours [Yang2021a].

    From the paper: interpolated quantizers, exact at every legal width, per layer or per channel;
    the size interpolates linearly, so the expected bits are the width itself.

    Differs: neighbours are legal widths, 0 and 1.6 among them, not whole numbers; learned steps
    per channel and width [Esser2020] in place of the DoReFa transform; the final rounding is to
    the nearest, and meeting a budget exactly is left to `size.fill`, not to an offset found by
    bisection. [reconstructed] The gradient stops where it leads outside the legal widths.
    """

    def start(self, weight: Tensor) -> None:
        """Widths and steps."""
        self.width = nn.Parameter(self.chosen.clone())
        self.grids = StepGrids(weight, self.choices)

    def soft(self, weight: Tensor) -> Tensor:
        """The mixture of the two neighbours."""
        narrow, wide, place = self._neighbours(self._width()[self.group_of])
        below, above = self.grids.quantize(weight, narrow), self.grids.quantize(weight, wide)
        return below + place[:, None] * (above - below)

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The quantizer of each row's width."""
        return self.grids.quantize(weight, nearest(widths, self.choice_values))

    def expected_bits(self) -> Tensor:
        """The widths."""
        return self._width()

    def group_widths(self) -> Tensor:
        """The nearest choices."""
        return self.choice_values[nearest(self._width().detach(), self.choice_values)]

    def _width(self) -> Tensor:
        return bounded(self.width, self.choices[0], self.choices[-1])

    def _neighbours(self, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = len(self.choices) - 1
        above = torch.searchsorted(self.choice_values, width.detach(), right=True).clamp(max=last)
        below = (above - 1).clamp_min(0)
        low, high = self.choice_values[below], self.choice_values[above]
        return below, above, (width - low) / (high - low).clamp_min(1e-6)
