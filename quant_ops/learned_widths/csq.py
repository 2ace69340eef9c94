"""CSQ and BSQ: bit planes that are switched off one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from quant_ops.bit_widths import TERNARY
from quant_ops.learned_widths.base import WidthSettings, bounded, straight_through
from quant_ops.learned_widths.residual import ResidualWidths

GATES = ("sigmoid", "l1")


@dataclass(frozen=True, slots=True)
class CSQSettings(WidthSettings):
    """Settings of `CSQ`.

    Attributes:
        gate: "sigmoid" of growing sharpness (CSQ), or "l1": a real number per plane that is
            rounded in the forward pass and made small by its absolute value (BSQ).
        first_sharpness: factor inside the sigmoid when training starts.
        last_sharpness: when it ends; in between geometric.
        price: factor of the mean of the gates in `penalty`.
    """

    gate: str = "sigmoid"
    first_sharpness: float = 3.0
    last_sharpness: float = 40.0
    price: float = 0.0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate {self.gate!r} is not one of {GATES}")


class CSQ(ResidualWidths):
    """Sum over planes of gate x digit x 2^-i x step, gate = sigmoid(beta m) [Xiao2023] or a
    number under an l1 penalty [Yang2021b].

    From the papers: weights as planes of positive minus negative bits, that is digits -1, 0, 1; a
    gate per plane; sigmoids sharpened geometrically until they are 0 or 1, or l1 and rounding
    straight through. Where all gates are hard, the sum is the integer code times the step.

    Differs: digits are read off the weights at every step (straight through) instead of being
    trained as two parameters per weight and plane, so that the network keeps its weights, its
    optimizer and its memory; BSQ's penalty is on one number per plane, not on all of its bits.
    Planes are kept from the top: a plane counts as much as the least open gate above it, so that
    the width is what a file stores. n planes are n + 1 bits; the first is ternary, stored as 1.6
    where that is legal; planes between two legal widths share a gate. Bits are in groups of
    channels, not per layer. [reconstructed] Sigmoid gates start at m = 1 (open) or -1 and stay
    between: one that runs off to where its sigmoid is flat would never come back.
    """

    Settings = CSQSettings
    settings: CSQSettings

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """All but 1, and but 2 where ternary is legal."""
        present = [w for w in legal if w > 1 and not (w == 2 and TERNARY in legal)]
        if not present:
            raise ValueError(f"bit planes need a width from 1.6 up among {legal}")
        return tuple([0.0] * (0 in legal) + present)

    @classmethod
    def ratios(cls, parts: Sequence[float]) -> list[int]:
        """2 for each plane more."""
        return [2 ** (wide - narrow) for narrow, wide in pairwise(planes(parts))]

    @classmethod
    def limits(cls, parts: Sequence[float]) -> list[int]:
        """All digits of the part are 1."""
        return [2 ** planes(parts)[0] - 1, *(ratio - 1 for ratio in cls.ratios(parts))]

    def range_in_steps(self) -> float:
        """All digits of all planes are 1."""
        first, last = planes(self.parts)[0], planes(self.parts)[-1]
        return float((2**last - 1) / 2 ** (last - first))

    def start_gates(self) -> None:
        """Gate parameters (groups, parts)."""
        is_open = self.open_parts()
        self.gate = nn.Parameter(2 * is_open - 1 if self.settings.gate == "sigmoid" else is_open)

    def gates(self) -> Tensor:
        """(groups, parts) between 0 and 1; the first is 1 where 0 is not legal."""
        if self.settings.gate == "sigmoid":
            first, last = self.settings.first_sharpness, self.settings.last_sharpness
            sharpness = first * (last / first) ** self.share
            value = torch.sigmoid(sharpness * bounded(self.gate, -1.0, 1.0))
        else:
            value = bounded(self.gate, 0.0, 1.0)
        if self.first:
            return value
        return torch.cat([torch.ones_like(value[:, :1]), value[:, 1:]], dim=1)

    def soft_gates(self) -> Tensor:
        """The gates of the planes that count, rounded straight through for l1."""
        kept = self.kept()
        if self.settings.gate == "l1":
            return straight_through(kept.round(), kept)
        return kept

    def kept(self) -> Tensor:
        """The least gate from the top down to each plane."""
        return torch.cummin(self.gates(), dim=1).values

    def group_widths(self) -> Tensor:
        """Up to the first gate that is not more than half open."""
        return self.widths_with(self.gates().detach() > 0.5)

    def penalty(self) -> Tensor:
        """price x mean gate: l1, as gates are not negative."""
        return self.settings.price * self.gates().mean()


def planes(widths: Sequence[float]) -> list[int]:
    """Magnitude planes of each width: one bit is the sign.

    >>> planes([1.6, 2, 3, 8])
    [1, 1, 2, 7]
    """
    return [round(width) - 1 for width in widths]
