"""The distortion table: what each choice of each layer costs and how much it hurts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from search.allocation import Choice, finite_losses, total
from search.space import LayerChoice, SearchSpace
from search.strategy import Context


@dataclass(frozen=True, slots=True)
class Group:
    """What is chosen together: a layer, a layer and the residual beside it, an activation edge.

    Attributes:
        names: probe keys of the members.
        genes: for each member its first gene and the number of its genes.
        widths: for each member its ascending legal widths.
        choices: for each choice a position of every member; the widest comes last. Of a pair those
            whose residual is no wider than the layer: which of two tensors is called the residual
            makes little difference.
    """

    names: tuple[str, ...]
    genes: tuple[tuple[int, int], ...]
    widths: tuple[tuple[float, ...], ...]
    choices: tuple[tuple[int, ...], ...]

    def change(self, choice: int) -> dict[str, float]:
        """What to probe for a choice; a residual that is absent is not mentioned."""
        named = {
            name: widths[at]
            for name, widths, at in zip(self.names, self.widths, self.choices[choice], strict=True)
        }
        main = self.names[0]
        return {name: width for name, width in named.items() if name == main or width}

    def alone(self) -> list[int]:
        """The choices without a residual, from narrow to wide."""
        return [c for c, positions in enumerate(self.choices) if not any(positions[1:])]


def groups_of(space: SearchSpace) -> tuple[Group, ...]:
    """Layers in order, then edges."""
    groups: list[Group] = []
    residual = {choice.residual_of: choice for choice in space.layers if choice.residual_of}
    gene = 0
    for choice in space.layers:
        genes = (gene, choice.n_genes)
        gene += choice.n_genes
        if choice.residual_of:
            continue
        if choice.name in residual:
            groups.append(_pair(choice, residual[choice.name], gene))
        else:
            alone = tuple((at,) for at in range(len(choice.bit_widths)))
            groups.append(Group((choice.name,), (genes,), (choice.bit_widths,), alone))
    for number, edge in enumerate(space.activations, gene):
        widths: tuple[float, ...] = edge.bit_widths
        alone = tuple((at,) for at in range(len(widths)))
        groups.append(Group((f"edge:{edge.name}",), ((number, 1),), (widths,), alone))
    return tuple(groups)


def _pair(main: LayerChoice, residual: LayerChoice, next_gene: int) -> Group:
    choices = tuple(
        (i, j)
        for i, wide in enumerate(main.bit_widths)
        for j, narrow in enumerate(residual.bit_widths)
        if j == 0 or narrow <= wide
    )
    return Group(
        (main.name, residual.name),
        ((next_gene - main.n_genes, main.n_genes), (next_gene, residual.n_genes)),
        (main.bit_widths, residual.bit_widths),
        choices,
    )


@dataclass(frozen=True)
class DistortionTable:
    """Groups as `groups_of` gives them; one number per choice.

    Attributes:
        space: of the choices.
        groups: what is chosen together.
        losses: per group, quality loss with this group alone quantized; falls with the width.
        costs: cost name to per-group differences from `base`'s cost.
        base: choices that the differences were taken from, per group.
        base_costs: every cost of the base.
    """

    space: SearchSpace
    groups: tuple[Group, ...]
    losses: tuple[NDArray[np.float64], ...]
    costs: Mapping[str, tuple[NDArray[np.float64], ...]]
    base: Choice
    base_costs: Mapping[str, float]

    def candidate(self, choice: Sequence[int]) -> Candidate:
        """The candidate of one choice per group."""
        return self.space.decode(genome_of(self.groups, choice))

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

    def layer_losses(self, name: str) -> NDArray[np.float64]:
        """Losses of a layer at each of its widths, without its residual."""
        for group, losses in zip(self.groups, self.losses, strict=True):
            if group.names[0] == name:
                return losses[group.alone()]
        raise KeyError(name)


def genome_of(groups: Sequence[Group], choice: Sequence[int]) -> list[int]:
    """One position per gene from one choice per group: all genes of a layer get the layer's."""
    position: dict[int, int] = {}
    for group, chosen in zip(groups, choice, strict=True):
        for (first, n_genes), at in zip(group.genes, group.choices[chosen], strict=True):
            position |= dict.fromkeys(range(first, first + n_genes), at)
    return [position[gene] for gene in sorted(position)]


def measure_table(context: Context) -> DistortionTable:
    """Probe every choice of every group alone; a pinned group needs no probe.

    Losses are made to fall with the width (running minimum from narrow to wide): a wider width
    that measures worse than a narrower one does so by noise.
    """
    space = context.space
    groups = groups_of(space)
    losses = _probe_losses(context, groups)
    base = tuple(len(group.choices) - 1 for group in groups)
    base_costs = context.cost_of(space.decode(genome_of(groups, base)))
    names = ["size_bytes", *(name for name in context.budgets if name != "size_bytes")]
    costs: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for g, group in enumerate(groups):
        changed = [
            base_costs
            if at == base[g]
            else context.cost_of(space.decode(genome_of(groups, (*base[:g], at, *base[g + 1 :]))))
            for at in range(len(group.choices))
        ]
        for name in names:
            costs[name].append(np.array([c[name] - base_costs[name] for c in changed], float))
    return DistortionTable(
        space,
        groups,
        tuple(losses),
        {name: tuple(values) for name, values in costs.items()},
        base,
        base_costs,
    )


def n_probes(space: SearchSpace) -> int:
    """How many measurements a table takes."""
    sizes = (len(group.choices) for group in groups_of(space))
    return sum(size for size in sizes if size > 1)


def _probe_losses(context: Context, groups: Sequence[Group]) -> list[NDArray[np.float64]]:
    searched = [group for group in groups if len(group.choices) > 1]
    changes = [group.change(at) for group in searched for at in range(len(group.choices))]
    answers = iter(context.probe(changes))
    measured = [np.zeros(len(group.choices)) for group in groups]
    for values, group in zip(measured, groups, strict=True):
        if len(group.choices) > 1:
            values[:] = [next(answers) for _ in group.choices]
    return [
        _falling(group, losses)
        for group, losses in zip(groups, finite_losses(measured), strict=True)
    ]


def _falling(group: Group, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each choice the least loss of those that are nowhere wider."""
    positions = np.array(group.choices)
    no_wider = (positions[None, :, :] <= positions[:, None, :]).all(axis=2)
    least: NDArray[np.float64] = np.where(no_wider, losses[None, :], np.inf).min(axis=1)
    return least
