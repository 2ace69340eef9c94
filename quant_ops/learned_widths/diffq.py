"""DiffQ: pseudo quantization noise of a learned width in place of rounding."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_ops.learned_widths import gates
from quant_ops.learned_widths.base import LearnedWidths, WidthSettings, nearest, straight_through

RANGES = ("channel", "layer")
NOISES = ("uniform", "gaussian")
_NEAREST_TO_END = 0.02  # a sigmoid that starts at its end has no gradient


@dataclass(frozen=True, slots=True)
class DiffQSettings(WidthSettings):
    """Settings of `DiffQ`.

    Attributes:
        weight_range: "channel" has a range for every channel, "layer" one for all.
        noise: "uniform" in +-1/2 step as in the paper, or "gaussian" of the same variance.
        phi: gate parameter of a group that starts present, its negative of one that does not.
    """

    weight_range: str = "channel"
    noise: str = "uniform"
    phi: float = 4.0

    def __post_init__(self) -> None:
        if self.weight_range not in RANGES:
            raise ValueError(f"weight_range {self.weight_range!r} is not one of {RANGES}")
        if self.noise not in NOISES:
            raise ValueError(f"noise {self.noise!r} is not one of {NOISES}")


class DiffQ(LearnedWidths):
    """w + R / (2^b - 1) n, with b between the narrowest and widest legal width [Defossez2022].

    From the paper: the noise n of mean 0 and variance 1/12 in place of rounding, so that the
    gradients of weights, widths and range are true ones; b = b_min + sigmoid(l)(b_max - b_min).

    Differs: the range is R = 2 max |w| around 0 (the file's mid-rise levels, ternary for 1.6
    bits), per channel unless asked otherwise, where one outlier of a layer does not set all steps;
    a group is of output channels, not of consecutive weights; widths end as the nearest legal one.
    Added: b alone never reaches 0 (its noise would be infinite), so a group that may be pruned has
    a hard-concrete gate beside it [Louizos2018], and expects P(gate open) x b bits.
    """

    Settings = DiffQSettings
    settings: DiffQSettings
    gated: bool
    _ends: ClassVar[float] = _NEAREST_TO_END

    def start(self, weight: Tensor) -> None:
        """Logits and gates; the range is read off the weights at every step."""
        self.gated = self.choices[0] == 0
        self._low, self._high = self.choices[int(self.gated)], self.choices[-1]
        span = max(self._high - self._low, 1e-6)
        place = ((self.chosen - self._low) / span).clamp(self._ends, 1 - self._ends)
        self.logit = nn.Parameter(torch.logit(place))
        phi = torch.where(self.chosen > 0, self.settings.phi, -self.settings.phi)
        self.phi = nn.Parameter(phi) if self.gated else None

    def widths_if_present(self) -> Tensor:
        """The real-valued width of each group that is not pruned (groups,)."""
        return self._low + torch.sigmoid(self.logit) * (self._high - self._low)

    def soft(self, weight: Tensor) -> Tensor:
        """Weights with noise, times the gates."""
        step = self._range(weight) / (torch.exp2(self.widths_if_present()) - 1)[self.group_of, None]
        noisy = weight + step * self._noise(weight)
        if self.phi is None:
            return noisy
        return noisy * gates.sample(self.phi, self.generator)[self.group_of, None]

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The nearest of as many equally spaced levels as fill the range, ends included."""
        # 2^1.6 - 1 is 2.03, and ternary weights have two steps
        n_steps = torch.round(torch.exp2(widths) - 1)[:, None]
        step = self._range(weight.detach()) / n_steps.clamp_min(1)
        code = torch.round((weight.detach() / step) + n_steps / 2).clamp_min(0)
        level = (torch.minimum(code, n_steps) - n_steps / 2) * step
        return torch.where(widths[:, None] > 0, straight_through(level, weight), 0.0)

    def expected_bits(self) -> Tensor:
        """P(present) x width."""
        bits = self.widths_if_present()
        return bits if self.phi is None else gates.open_probability(self.phi) * bits

    def live(self) -> Tensor:
        """P(present)."""
        if self.phi is None or self._is_frozen:
            return super().live()
        return gates.open_probability(self.phi)[self.group_of]

    def group_widths(self) -> Tensor:
        """The nearest legal width, 0 where the gate is closed."""
        present = self.choice_values[int(self.gated) :]
        widths = present[nearest(self.widths_if_present().detach(), present)]
        return widths if self.phi is None else torch.where(gates.is_open(self.phi), widths, 0.0)

    def _range(self, weight: Tensor) -> Tensor:
        largest = weight.abs().amax(dim=1, keepdim=True)
        if self.settings.weight_range == "layer":
            largest = largest.amax()
        return 2 * largest.clamp_min(torch.finfo(weight.dtype).tiny)

    def _noise(self, weight: Tensor) -> Tensor:
        shape, device = weight.shape, weight.device
        if self.settings.noise == "gaussian":
            return torch.randn(shape, generator=self.generator, device=device) * 12**-0.5
        return torch.rand(shape, generator=self.generator, device=device) - 0.5
