"""HGQ: fixed point, widths and integer bits moved by the surrogate gradients of clipping."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_ops.bit_widths import TERNARY
from quant_ops.hgq.fixed_point import Arithmetic, train_fixed_point
from quant_ops.learned_widths.base import (
    LearnedWidths,
    WidthSettings,
    bounded,
    nearest,
    straight_through,
)
from quant_ops.stored import MAX_EXPONENT

ARITHMETIC = Arithmetic("RND_CONV", "SAT_SYM")
_TRIED = 4  # octaves below the range, where a start may clip for a smaller error


@dataclass(frozen=True, slots=True)
class HGQSettings(WidthSettings):
    """Settings of `HGQ`.

    Attributes:
        gamma: price of a bit, whatever it costs in bytes.
    """

    gamma: float = 1e-8


class HGQ(LearnedWidths):
    """round(clamp(w, -h, h) 2^f) 2^-f with h = 2^i - 2^-f, both i and i + f learned [Sun2024].

    From the paper: fixed point with scales that are powers of two, its gradients (with e = w - q:
    ln 2 x e for the fraction bits, the moving end for what is clipped), 0 bits removing the
    channel, the signed charge gamma on the bits.

    Differs: bits belong to a group of channels, integer bits to a channel, since every channel
    stores a scale; the forward pass uses the legal width nearest to the real one, not the nearest
    whole number. A width counts the sign and is symmetric: width b has the codes
    +-(2^(b-1) - 1), so that 2 bits are ternary, and stored so where that is legal. Integer bits
    stay within the octaves that the scales of a layer span; `quantized_rows` of
    `quant_ops.hgq.bridge` stores the weights as they are.
    """

    Settings = HGQSettings
    settings: HGQSettings
    magnitudes: Tensor
    top: Tensor

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """0 and 3 to 8 as far as they are legal; ternary stands for 2 if it is."""
        narrow = [w for w in (TERNARY, 2) if w in legal][:1]
        wide = [w for w in legal if w > 2]
        if not narrow + wide:
            raise ValueError(f"HGQ needs one of 1.6, 2, 3 to 8 bits among {legal}")
        return tuple([0.0] * (0 in legal) + narrow + wide)

    def start(self, weight: Tensor) -> None:
        """Widths, and the integer bits of least squared error at them."""
        digits = [max(0.0, round(w) - 1.0) for w in self.choices]
        self.register_buffer("magnitudes", torch.tensor(digits))
        largest = weight.abs().amax(dim=1)
        # a row of zeros starts where the largest weight of the layer is
        largest = torch.where(largest > 0, largest, largest.max() if largest.any() else 1.0)
        needed = largest.log2().ceil()
        self.register_buffer("top", needed.max())
        self.width = nn.Parameter(self.chosen.clone())
        self.integer_bits = nn.Parameter(needed)
        with torch.no_grad():
            digits_of = self._digits(self.chosen)[self.group_of].clamp_min(1)
            errors = []
            for octaves in range(_TRIED):
                tried = self._fixed_point(weight, needed - octaves, digits_of)
                errors.append((tried - weight).square().sum(dim=1))
            self.integer_bits.sub_(torch.stack(errors).argmin(dim=0))

    def soft(self, weight: Tensor) -> Tensor:
        """The weights at the nearest legal widths, with gradients for the real ones."""
        width = self._width()
        digits = straight_through(self._digits(self.group_widths()), width)
        return self._fixed_point(weight, self._integer_bits(), digits[self.group_of])

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The weights at given widths."""
        return self._fixed_point(weight, self._integer_bits(), self._digits(widths))

    def expected_bits(self) -> Tensor:
        """The real widths."""
        return self._width()

    def group_widths(self) -> Tensor:
        """The nearest choices."""
        return self.choice_values[nearest(self._width().detach(), self.choice_values)]

    def penalty(self) -> Tensor:
        """gamma x the sum of the widths, which may be below 0."""
        return self.settings.gamma * self.width.sum()

    def _fixed_point(self, weight: Tensor, integer_bits: Tensor, digits: Tensor) -> Tensor:
        """weight (out, n), bits (out,)."""
        signed = torch.ones_like(digits)[:, None]
        return train_fixed_point(
            weight,
            signed,
            integer_bits[:, None],
            digits[:, None],
            ARITHMETIC,
            other_is_total=True,
        )

    def _digits(self, widths: Tensor) -> Tensor:
        return self.magnitudes[nearest(widths, self.choice_values)]

    def _integer_bits(self) -> Tensor:
        low, high = self.top - MAX_EXPONENT + 1, self.top + 1
        # not a clamp, which would keep what has left the interval outside for good
        return straight_through(self.integer_bits.clamp(low, high), self.integer_bits)

    def _width(self) -> Tensor:
        return bounded(self.width, self.choices[0], self.choices[-1])
