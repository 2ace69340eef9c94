"""Self-compressing networks: bits and exponent of every channel, moved straight through."""

import torch
from torch import Tensor, nn

from quant_ops.learned_widths.base import LearnedWidths, bounded, nearest, straight_through
from quant_ops.learned_widths.grids import best_grid
from quant_ops.quantized import code_range
from quant_ops.quantizers import effective_scheme


class SelfCompressing(LearnedWidths):
    """2^e round(clamp(2^-e w, -2^(b-1), 2^(b-1) - 1)), b and e learned [Csefalvay2023].

    From the paper: the formula, b >= 0 with 0 removing the channel, straight-through rounding,
    the mean of b as what is made small.

    Differs: the forward pass always uses the legal width nearest to b (ternary, and the binary
    levels +-1/2, where those are it), so that training sees what is stored; a group of channels
    may share b, each keeps its e, but by default none does. [reconstructed] b gets the gradient of
    the clipping limits, ln 2 x 2^(b-1) x 2^e, at the weights that are clipped, in a removed channel
    too: all of its weights are, and it can come back.
    """

    usual_group = 1  # groups of 8 would sum gradients that single channels follow better
    low: Tensor
    high: Tensor
    offset: Tensor

    def start(self, weight: Tensor) -> None:
        """Bits, and the exponents of least squared error at the starting widths."""
        ranges = [
            code_range(w, effective_scheme(w, "mid_tread")) if w else (0, 0) for w in self.choices
        ]
        self.register_buffer("low", torch.tensor([float(low) for low, _ in ranges]))
        self.register_buffer("high", torch.tensor([float(high) for _, high in ranges]))
        self.register_buffer("offset", torch.tensor([0.5 * (w == 1) for w in self.choices]))
        self.width = nn.Parameter(self.chosen.clone())
        exponent = torch.zeros(len(weight))
        present = [at for at, width in enumerate(self.choices) if width]
        per_row = nearest(self.chosen, self.choice_values).clamp_min(present[0])[self.group_of]
        for at in present:
            rows = per_row == at
            if rows.any():
                step = best_grid(weight[rows], self.choices[at], schemes=("mid_tread",))[1]
                exponent[rows] = step.log2()
        self.exponent = nn.Parameter(exponent)

    def soft(self, weight: Tensor) -> Tensor:
        """The weights at the nearest legal widths; limits follow b straight through."""
        half = torch.exp2(self._width() - 1)[self.group_of, None]
        moved = half - half.detach()
        return self._quantize(weight, self.group_widths()[self.group_of], moved)

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The weights at given widths."""
        return self._quantize(weight, widths, weight.new_zeros(len(weight), 1))

    def expected_bits(self) -> Tensor:
        """b."""
        return self._width()

    def group_widths(self) -> Tensor:
        """The nearest choices."""
        return self.choice_values[nearest(self._width().detach(), self.choice_values)]

    def _quantize(self, weight: Tensor, widths: Tensor, moved: Tensor) -> Tensor:
        index = nearest(widths, self.choice_values)
        low, high, offset = (x[index][:, None] for x in (self.low, self.high, self.offset))
        step = torch.exp2(self.exponent)[:, None]
        ratio, top = weight / step, high + 2 * offset
        # not minimum and maximum: where both limits are 0, a tie would split the gradient
        inside = torch.where(ratio > top, top + moved, torch.where(ratio < low, low - moved, ratio))
        codes = (weight.detach() / step.detach() - offset).round()
        levels = torch.minimum(torch.maximum(codes, low), high) + offset
        return straight_through(levels, inside) * step

    def _width(self) -> Tensor:
        return bounded(self.width, self.choices[0], self.choices[-1])
