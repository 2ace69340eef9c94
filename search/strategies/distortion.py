"""The distortion table: what each choice of each layer costs and how much it hurts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from search.allocation import Choice, finite_losses, total
from search.space import SearchSpace
from search.strategy import Context


@dataclass(frozen=True)
class DistortionTable:
    """One group per layer, then one per activation edge; one choice per legal width.

    Attributes:
        space: of the choices.
        losses: per group, quality loss with this group alone quantized; falls with the width.
        costs: cost name to per-group differences from `base`'s cost.
        base: genome positions that the differences were taken from, per group.
        base_costs: every cost of the base.
    """

    space: SearchSpace
    losses: tuple[NDArray[np.float64], ...]
    costs: Mapping[str, tuple[NDArray[np.float64], ...]]
    base: Choice
    base_costs: Mapping[str, float]

    def candidate(self, choice: Sequence[int]) -> Candidate:
        """The candidate of one choice per group."""
        return self.space.decode(genome_of(self.space, choice))

    def loss(self, choice: Sequence[int]) -> float:
        """Sum of the groups' losses."""
        return total(self.losses, choice)

    def cost(self, name: str, choice: Sequence[int]) -> float:
        """The cost as a sum; exact where the cost is additive and nothing is removed."""
        return self.base_costs[name] + total(self.costs[name], choice)

    def limits(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """The budgets as limits on the sums of differences."""
        return {name: limit - self.base_costs[name] for name, limit in budgets.items()}

    def rescaled(self, weights: Sequence[float]) -> "DistortionTable":
        """The table with every group's losses multiplied by its weight."""
        losses = tuple(w * loss for w, loss in zip(weights, self.losses, strict=True))
        return replace(self, losses=losses)


def group_widths(space: SearchSpace) -> tuple[tuple[float, ...], ...]:
    """Per group (layers, then edges) its legal widths."""
    return (
        *(choice.bit_widths for choice in space.layers),
        *(edge.bit_widths for edge in space.activations),
    )


def genome_of(space: SearchSpace, choice: Sequence[int]) -> list[int]:
    """One position per gene from one per group: all genes of a layer get the layer's."""
    genome: list[int] = []
    for layer, at in zip(space.layers, choice, strict=False):
        genome += [at] * layer.n_genes
    return [*genome, *choice[len(space.layers) :]]


def measure_table(context: Context) -> DistortionTable:
    """Probe every choice of every group alone; a pinned group needs no probe.

    Losses are made to fall with the width (running minimum from narrow to wide): a wider width
    that measures worse than a narrower one does so by noise.
    """
    space = context.space
    widths = group_widths(space)
    losses = _probe_losses(context, widths)
    base = tuple(len(w) - 1 for w in widths)
    base_costs = context.cost_of(space.decode(genome_of(space, base)))
    names = ["size_bytes", *(name for name in context.budgets if name != "size_bytes")]
    costs: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for g, legal in enumerate(widths):
        changed = [
            base_costs
            if at == base[g]
            else context.cost_of(space.decode(genome_of(space, (*base[:g], at, *base[g + 1 :]))))
            for at in range(len(legal))
        ]
        for name in names:
            costs[name].append(np.array([c[name] - base_costs[name] for c in changed], float))
    return DistortionTable(
        space,
        tuple(losses),
        {name: tuple(groups) for name, groups in costs.items()},
        base,
        base_costs,
    )


def _probe_losses(context: Context, widths: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    space = context.space
    keys = [choice.name for choice in space.layers]
    keys += [f"edge:{edge.name}" for edge in space.activations]
    searched = [g for g, legal in enumerate(widths) if len(legal) > 1]
    answers = iter(context.probe([{keys[g]: width} for g in searched for width in widths[g]]))
    measured = [np.zeros(len(legal)) for legal in widths]
    for g in searched:
        measured[g] = np.array([next(answers) for _ in widths[g]], dtype=float)
    return [np.minimum.accumulate(group) for group in finite_losses(measured)]
