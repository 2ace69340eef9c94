"""Rate-distortion: measured loss of each layer at each width, then the exact integer program."""

from dataclasses import dataclass

import numpy as np

from quant_ops.candidate import Candidate, unique
from search.allocation import allocate, sweep
from search.evaluation import within
from search.strategies.distortion import DistortionTable, measure_table
from search.strategies.pairs import BlockTable, with_pairs
from search.strategies.uniform import evaluate_in_batches
from search.strategy import Context, Strategy, Traits

REPAIRS = 6  # how often limits are tightened because the exact cost is above the sum


class RateDistortion(Strategy):
    """Losses add up over layers, bytes too: the best widths at a size are a knapsack [Shoham1988].

    The table is measured with one layer quantized at a time; the program is solved at the
    budgets and at sizes evenly spread in log2 below. Widths are per layer: channel groups of one
    layer get the same one. Losses of pairs inside a block can correct the sum [Li2021].
    """

    name = "rate-distortion"
    traits = Traits(
        "measured loss per layer and width, integer program at each size",
        cost_per_trial="O(1) after one probe per layer and width",
    )

    @dataclass(frozen=True, slots=True)
    class Settings:
        """Settings.

        Attributes:
            points: sizes between the smallest sensible one and the loosest budget.
            pairs: measure what pairs of layers inside a block lose together, too.
        """

        points: int = 24
        pairs: bool = False

    settings: Settings

    def run(self, context: Context) -> None:
        table = measure_table(context)
        program = Program(context, with_pairs(context, table) if self.settings.pairs else table)
        evaluate_in_batches(context, front_candidates(program, table, self.settings.points))


def front_candidates(program: "Program", table: DistortionTable, points: int) -> list[Candidate]:
    """The program's answers: at every size asked for, then at `points`, coarse ones first."""
    context = program.context
    smallest, largest = size_range(context, table)
    sizes = np.geomspace(smallest, largest, max(points, 2))
    asked = [float(size) for size in reversed(context.sizes)] or [largest]
    wanted = [*asked, *(float(sizes[i]) for i in coarse_to_fine(len(sizes)))]
    found = (program.solve(size) for size in wanted)
    return unique(candidate for candidate in found if candidate is not None)


class Program:
    """The integer program of one table under the budgets of a run.

    Every cost enters as a sum of differences from the widest candidate. That is exact for size
    and MACs while nothing is removed and for BOPs at fixed activation widths; elsewhere it is a
    linearisation and the exact cost decides.
    """

    def __init__(self, context: Context, table: DistortionTable | BlockTable) -> None:
        self.context = context
        self.table = table
        # a cost that no single change moves (peak memory, say) can only be checked afterwards
        self.linear = {
            name: limit
            for name, limit in context.budgets.items()
            if any(group.any() for group in table.costs[name])
        }

    def solve(self, size_bytes: float) -> Candidate | None:
        """The best candidate by the table of at most `size_bytes`, inside every budget, or None.

        A candidate whose exact costs are over a limit is replaced by the next one, found under
        a limit that is tighter by the excess; by a growing multiple of it where that is not
        enough, as with a product of two widths far from the widest.
        """
        limits = {**self.linear, "size_bytes": size_bytes}
        tightened = dict(limits)
        for attempt in range(REPAIRS):
            choice = allocate(self.table.losses, self.table.costs, self.table.limits(tightened))
            if choice is None:
                return None
            candidate = self.table.candidate(choice)
            exact = self.context.cost_of(candidate)
            if within(limits, exact):
                return candidate if within(self.context.budgets, exact) else None
            for name, limit in limits.items():
                tightened[name] -= (1 + attempt) * max(0.0, exact[name] - limit)
        return None


def size_range(context: Context, table: DistortionTable) -> tuple[float, float]:
    """From the smallest sensible file to the loosest budget, in bytes.

    A hull point that is predicted to be worse than the worst single layer is taken for useless,
    unless nothing better fits.
    """
    space = context.space
    largest = min(
        context.budgets.get("size_bytes", np.inf), float(context.size_of(space.largest()))
    )
    smallest = float(context.size_of(space.smallest()))
    useless = max((float(group.max()) for group in table.losses), default=0.0)
    for choice in sweep(table.losses, table.costs["size_bytes"]):
        if table.loss(choice) <= useless:
            smallest = max(smallest, table.cost("size_bytes", choice))
            break
    return min(smallest, largest), largest


def coarse_to_fine(n: int) -> list[int]:
    """0..n-1 in bit-reversed order, so that any prefix is spread evenly.

    >>> coarse_to_fine(5)
    [0, 4, 2, 1, 3]
    """
    width = max(n - 1, 1).bit_length()
    order = (int(f"{i:0{width}b}"[::-1], 2) for i in range(2**width))
    return [i for i in order if i < n]
