"""DQA: attention over quantizers of high, medium and low width, sharpened over the training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_ops.learned_widths.base import LearnedWidths, WidthSettings, nearest
from quant_ops.learned_widths.grids import StepGrids

WIDTHS = (2, 4, 8)
_SPREAD_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class DQASettings(WidthSettings):
    """Settings of `DQA`.

    Attributes:
        first_temperature: of the softmax when training starts.
        last_temperature: when it ends; in between geometric.
        price: factor of the paper's own penalty, price x sum over choices of attention x 4^i / 3.
    """

    first_temperature: float = 1.0
    last_temperature: float = 0.03
    price: float = 0.0


class DQA(LearnedWidths):
    """sum_k a_k Q_k(w), a = softmax(alpha / std(alpha) / T) [BoukliHacene2021].

    From the paper: quantizers of 2, 4 and 8 bits, one learned vector of attention, divided by its
    standard deviation, a temperature that falls to 0.03, the penalty with weights 1, 4, 16.

    Differs: the paper uses the attention to reach one low width smoothly; here what wins at the
    end is the width, so the choices are 0 (where legal) and those of 2, 4 and 8 that are (the
    first, middle and last legal width where fewer than two are), per group of channels; attention
    starts highest at the starting width, not at the lowest; the temperature starts at 1, not at
    100, where all choices weigh the same whatever the attention is, so that no price could make
    the file smaller before it has fallen; learned steps [Esser2020].
    [reconstructed] The standard deviation passes no gradient, as if divided in place.
    """

    Settings = DQASettings
    settings: DQASettings

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """0 where legal, and high, medium, low."""
        present = [w for w in legal if w]
        of_paper = [w for w in present if w in WIDTHS]
        if len(of_paper) < 2:
            of_paper = sorted({present[0], present[len(present) // 2], present[-1]})
        return tuple([0.0] * (0 in legal) + of_paper)

    def start(self, weight: Tensor) -> None:
        """Attention that peaks at the starting width, and steps."""
        distance = (self.choice_values - self.chosen[:, None]).abs()
        self.alpha = nn.Parameter(-distance / self.choice_values.max())
        self.grids = StepGrids(weight, self.choices)

    def attention(self) -> Tensor:
        """(groups, choices), rows sum to 1."""
        first, last = self.settings.first_temperature, self.settings.last_temperature
        temperature = first * (last / first) ** self.share
        spread = self.alpha.detach().std(dim=1, keepdim=True, correction=0)
        return torch.softmax(self.alpha / spread.clamp_min(_SPREAD_FLOOR) / temperature, dim=1)

    def soft(self, weight: Tensor) -> Tensor:
        """The mixture of all quantizers."""
        rows = self.attention()[self.group_of]
        out = torch.zeros_like(weight)
        for at, width in enumerate(self.choices):
            if width:
                index = torch.full_like(self.group_of, at)
                out = out + rows[:, at, None] * self.grids.quantize(weight, index)
        return out

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The quantizer of each row's width."""
        return self.grids.quantize(weight, nearest(widths, self.choice_values))

    def expected_bits(self) -> Tensor:
        """Attention times widths."""
        return self.attention() @ self.choice_values

    def live(self) -> Tensor:
        """Attention of everything but 0 bits."""
        if self._is_frozen or self.choices[0] != 0:
            return super().live()
        return 1 - self.attention()[self.group_of, 0]

    def group_widths(self) -> Tensor:
        """The choice with the highest attention."""
        return self.choice_values[self.alpha.detach().argmax(dim=1)]

    def penalty(self) -> Tensor:
        """price x mean over groups of sum_k g_k a_k, g = 1, 4, 16 from the lowest width above 0."""
        present = (self.choice_values > 0).float()
        costs = present * 4 ** (present.cumsum(0) - 1).clamp_min(0)
        return self.settings.price * (self.attention() @ costs).mean()
