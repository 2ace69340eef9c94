"""Bayesian Bits: residuals of 2, 4, 8 bits behind hard-concrete gates."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from quant_ops.bit_widths import TERNARY
from quant_ops.learned_widths import gates
from quant_ops.learned_widths.base import WidthSettings
from quant_ops.learned_widths.residual import ResidualWidths

CHAIN = (2, 4, 8)
_ALWAYS_OPEN = 20.0  # phi of a gate that is no choice


@dataclass(frozen=True, slots=True)
class BayesianBitsSettings(WidthSettings):
    """Settings of `BayesianBits`.

    Attributes:
        freeze: the paper trains 10 of 40 epochs with gates that no longer change.
        phi: gate parameter of what starts open; its negative closed.
        prior: factor of the paper's regulariser.
        cost_share: the layer's cost (MACs or bytes) over that of the most expensive layer.
    """

    freeze: float = 0.75
    phi: float = 2.0
    prior: float = 0.0
    cost_share: float = 1.0


class BayesianBits(ResidualWidths):
    """z_2 (x_2 + z_4 (e_4 + z_8 e_8)), x clipped to a learned range [VanBaalen2020].

    From the paper: s_2 = 2 B / 3 and s_2b = s_b / (2^b + 1), so that every residual nests in the
    grid before it; gates and their probabilities; a gate z_2 that prunes; the prior as `penalty`,
    prior x cost x sum_b b x P(all gates up to b are open); gates fixed for the last part.

    Differs: all gates belong to a group of channels, not z_2 to a channel and the others to a
    tensor; 16 and 32 bits are left out, since packed weights end at 8; the grid of 2 bits has
    three levels only, so it is stored as ternary where that is legal. The expected bits count
    what is stored, the widest open gate alone, not the sum over gates of the prior.
    """

    Settings = BayesianBitsSettings
    settings: BayesianBitsSettings

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """0 and 2, 4, 8 as far as they are legal; ternary stands for 2 if it is."""
        chain = [w for w in legal if w in CHAIN[1:]]
        base = [w for w in (TERNARY, 2) if w in legal][:1]
        if not chain + base:
            raise ValueError(f"Bayesian Bits needs one of 1.6, 2, 4, 8 among {legal}")
        return tuple([0.0] * (0 in legal) + base + chain)

    @classmethod
    def ratios(cls, parts: Sequence[float]) -> list[int]:
        """(2^b' - 1) / (2^b - 1)."""
        steps = [2 ** round(b) - 1 for b in parts]
        return [wide // narrow for narrow, wide in pairwise(steps)]

    @classmethod
    def limits(cls, parts: Sequence[float]) -> list[int]:
        """What is left of a coarser rounding is at most half its step."""
        return [2 ** (round(parts[0]) - 1) - 1, *(ratio // 2 for ratio in cls.ratios(parts))]

    def range_in_steps(self) -> float:
        """B = s (2^b - 1) / 2; a touch less, so that no value rounds to a level beyond."""
        return float((2 ** round(self.parts[0]) - 1) / 2 * (1 + 1e-6))

    def start_gates(self) -> None:
        """phi per group and part."""
        self.phi = nn.Parameter((2 * self.open_parts() - 1) * self.settings.phi)

    def soft_gates(self) -> Tensor:
        """Products of samples: a part needs all gates before it."""
        return gates.sample(self._phi(), self.generator).cumprod(dim=1)

    def kept(self) -> Tensor:
        """P(all gates up to the part are open)."""
        return gates.open_probability(self._phi()).cumprod(dim=1)

    def group_widths(self) -> Tensor:
        """Up to the first gate that is likely closed."""
        return self.widths_with(gates.is_open(self._phi()))

    def penalty(self) -> Tensor:
        """The prior, mean over groups."""
        bits = self.choice_values[self.first :]
        return self.settings.prior * self.settings.cost_share * (self.kept() @ bits).mean()

    def _phi(self) -> Tensor:
        if self.first:
            return self.phi
        always = torch.full_like(self.phi[:, :1], _ALWAYS_OPEN)
        return torch.cat([always, self.phi[:, 1:]], dim=1)
