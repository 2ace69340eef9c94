"""Widths per channel from what each channel at each width costs: four published rules.

Every rule has one level that trades size for loss, larger is wider; the caller finds the level
that fills a file. A table holds, per group of channels, predicted losses and bits at the legal
widths of the group, ascending.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.allocation import lower_hull

ANCHOR = 6.0  # width at which the quadratic law is read off: neither broken nor lost in noise


@dataclass(frozen=True, eq=False)
class GroupTable:
    """One group of channels that shares a width.

    Attributes:
        widths: ascending legal widths.
        losses: predicted loss at each.
        bits: stored bits at each.
        spread: standard deviation of the group's weights.
    """

    widths: NDArray[np.float64]
    losses: NDArray[np.float64]
    bits: NDArray[np.float64]
    spread: float

    @property
    def weights(self) -> float:
        """Number of weights."""
        return float(self.bits[-1] / self.widths[-1])

    @property
    def sensitivity(self) -> float:
        """D in loss = D x 4^-b, read off near 6 bits."""
        at = int(np.argmin(np.abs(self.widths - ANCHOR)))
        return float(self.losses[at] * 4.0 ** self.widths[at])


Rule = Callable[[Sequence[GroupTable], float], list[int]]


def water_filling(groups: Sequence[GroupTable], level: float) -> list[int]:
    """Reverse water-filling: b = level + log2(alpha) + 0.5 log2(h) per weight [Cover2006].

    With D = h alpha^2 the loss of a group is D 4^-b, and all groups that are not at an end lose
    the same by one more bit of storage. A width that is not legal becomes the nearest that is, so
    that negative ones become 0 or the narrowest; the search for the level solves for the rest.
    """
    out = []
    for group in groups:
        per_weight = group.sensitivity / max(group.weights, 1.0)
        wanted = level + 0.5 * np.log2(max(per_weight, 1e-300))
        out.append(int(np.argmin(np.abs(group.widths - wanted))))
    return out


def lagrangian(groups: Sequence[GroupTable], level: float) -> list[int]:
    """Every group minimises loss + bits x 2^-level over its widths [Young2021]."""
    price = 2.0**-level
    return [int(np.argmin(group.losses + price * group.bits)) for group in groups]


def greedy(groups: Sequence[GroupTable], level: float) -> list[int]:
    """From the narrowest on, every step of the lower convex hull that gains 2^-level per bit.

    The same as handing out bits one step at a time to whoever gains most per bit [Fox1966].
    """
    price, out = 2.0**-level, []
    for group in groups:
        hull = lower_hull(group.bits, group.losses)
        at = hull[0]
        for wider in hull[1:]:
            gain = (group.losses[at] - group.losses[wider]) / (group.bits[wider] - group.bits[at])
            if gain < price:
                break
            at = wider
        out.append(at)
    return out


def two_thirds(groups: Sequence[GroupTable], level: float) -> list[int]:
    """Numbers of levels in proportion to spread^(2/3) [Banner2019], whatever the outputs say."""
    out = []
    for group in groups:
        wanted = level + 2 / 3 * np.log2(max(group.spread, 1e-300))
        out.append(int(np.argmin(np.abs(group.widths - wanted))))
    return out


RULES: dict[str, Rule] = {
    "lagrangian": lagrangian,
    "greedy": greedy,
    "water-filling": water_filling,
    "two-thirds": two_thirds,
}
LEVELS = (-40.0, 60.0)  # every rule gives its narrowest and widest within


def level_for(
    rule: Rule, groups: Sequence[GroupTable], fits: Callable[[Sequence[int]], bool]
) -> list[int] | None:
    """The widest choice of a rule that fits, by bisection; None where not even the narrowest does.

    Args:
        rule: one of `RULES`.
        groups: the table.
        fits: whether a choice (position per group) is within every limit; monotone in the level.
    """
    low, high = LEVELS
    best = rule(groups, low)
    if not fits(best):
        return None
    widest = rule(groups, high)
    if fits(widest):
        return widest
    for _ in range(48):
        middle = 0.5 * (low + high)
        choice = rule(groups, middle)
        if choice == best:
            low = middle
        elif fits(choice):
            low, best = middle, choice
        else:
            high = middle
    return best
