"""Widths per channel: predicted loss of every channel at every width, four rules to spend bits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate, unique
from search.channel_widths import RULES, GroupTable, level_for
from search.evaluation import within
from search.strategies.distortion import DistortionTable, measure_table
from search.strategies.rate_distortion import coarse_to_fine, size_range
from search.strategies.uniform import evaluate_in_batches
from search.strategy import Context, Strategy, Traits


class ChannelAllocation(Strategy):
    """Spends every byte where the loss falls most, channel by channel.

    The losses of a layer's channels come from gradients and are scaled such that, all channels
    at one width, they add up to the layer's own loss in the measured table. Budgets other than
    the size are checked, not aimed at. Residual layers (`--dual`) are left out.
    """

    name = "channel-allocation"
    traits = Traits(
        "predicted loss per channel and width; water-filling, greedy, Lagrangian or 2/3 power",
        granularity=("group", "channel"),
        activations=False,
        cost_per_trial="O(1) after one table and a few backward passes",
    )

    @dataclass(frozen=True, slots=True)
    class Settings:
        """Settings.

        Attributes:
            rule: lagrangian, greedy, water-filling, two-thirds, or all of them.
            points: sizes between the smallest sensible one and the loosest budget.
        """

        rule: str = "lagrangian"
        points: int = 12

        def __post_init__(self) -> None:
            if self.rule not in (*RULES, "all"):
                raise ValueError(f"rule must be one of {', '.join(RULES)} or all, got {self.rule}")

    settings: Settings

    def run(self, context: Context) -> None:
        table = measure_table(context)
        groups, genes = group_tables(context, table)
        smallest, largest = size_range(context, table)
        sizes = np.geomspace(smallest, largest, max(self.settings.points, 2))
        wanted = [float(size) for size in reversed(context.sizes)]
        wanted += [float(sizes[i]) for i in coarse_to_fine(len(sizes))]
        rules = RULES if self.settings.rule == "all" else {self.settings.rule: None}
        found = [allocated(context, groups, genes, rule, size) for size in wanted for rule in rules]
        evaluate_in_batches(context, unique(c for c in found if c is not None))


def allocated(
    context: Context, groups: list[GroupTable], genes: list[int], rule: str, size_bytes: float
) -> Candidate | None:
    """The candidate of one rule of at most `size_bytes`, inside every budget, or None."""
    space = context.space
    base = space.encode(space.uniform(8))

    def candidate_of(choice: list[int]) -> Candidate:
        genome = list(base)
        for gene, at in zip(genes, choice, strict=True):
            genome[gene] = at
        return space.decode(genome)

    choice = level_for(
        RULES[rule],
        groups,
        lambda picked: context.size_of(candidate_of(list(picked))) <= size_bytes,
    )
    if choice is None:
        return None
    candidate = candidate_of(choice)
    return candidate if within(context.budgets, context.cost_of(candidate)) else None


def group_tables(context: Context, table: DistortionTable) -> tuple[list[GroupTable], list[int]]:
    """One table per gene of the layers that has a choice, and which gene it is."""
    space, statistics = context.space, context.channel_losses()
    groups, genes, gene = [], [], 0
    for choice in space.layers:
        layer = space.graph.layer_of[choice.name]
        members = choice.groups or (tuple(range(layer.out_channels)),)
        widths = np.array(choice.bit_widths, float)
        if len(widths) > 1 and not choice.residual_of:
            losses, spread = statistics[choice.name]
            scale = _measured_over_predicted(table.layer_losses(choice.name), losses)
            for offset, channels in enumerate(members):
                mine = list(channels)
                groups.append(
                    GroupTable(
                        widths,
                        np.minimum.accumulate(losses[mine].sum(axis=0) * scale),
                        widths * layer.weights_per_channel * len(mine),
                        float(np.sqrt(np.mean(spread[mine] ** 2))),
                    )
                )
                genes.append(gene + offset)
        gene += len(members)
    return groups, genes


def _measured_over_predicted(
    measured: NDArray[np.float64], predicted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Per width, what channels taken one by one miss of the whole layer's loss."""
    total = predicted.sum(axis=0)
    ratio = np.divide(measured, total, out=np.ones_like(total), where=total > 0)
    usable = ratio[ratio > 0]
    middle = float(np.median(usable)) if usable.size else 1.0
    held: NDArray[np.float64] = np.where(ratio > 0, ratio, middle)
    return held
