"""Around the front, where it is weakest: the corrected program, single moves and swaps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from search.evaluation import Evaluation, within
from search.strategies.channel_allocation import group_tables
from search.strategies.distortion import DistortionTable, measure_table
from search.strategies.proposals import Genome, fresh_batch
from search.strategies.random_search import stratified
from search.strategies.ranking import front_of, gaps
from search.strategies.rate_distortion import Program
from search.strategies.surrogate import GeneTable, fitted_weights
from search.strategy import Context, Strategy, Traits, batch_generator


class LocalSearch(Strategy):
    """Fills the largest gaps of the front, deterministic but for repairs.

    In each of the largest gaps between neighbours of the front the distortion table is corrected
    by the measured losses nearby; then the integer program is solved inside the gap, and the
    neighbours' one-step moves (one gene up or down, or one up and another down) are ranked by
    the corrected prediction. Only what lands in the gap is proposed.
    """

    name = "local-search"
    traits = Traits(
        "one-step swaps and a corrected integer program in the front's largest gaps",
        granularity=("layer", "group", "channel"),
    )

    @dataclass(frozen=True, slots=True)
    class Settings:
        """Settings.

        Attributes:
            gaps: how many gaps one batch looks at.
        """

        gaps: int = 4

        def __post_init__(self) -> None:
            if self.gaps < 1:
                raise ValueError(f"gaps must be at least 1, got {self.gaps}")

    settings: Settings

    def run(self, context: Context) -> None:
        table = measure_table(context)
        genes = GeneTable.of(table)
        if any(choice.groups for choice in context.space.layers):
            groups, numbers = group_tables(context, table)
            losses = (group.losses for group in groups)
            genes = genes.with_losses(dict(zip(numbers, losses, strict=True)))
        history = list(context.history())
        seen = {evaluation.candidate for evaluation in history}
        batch = 0
        while not context.should_stop():
            generator = batch_generator(context.seed, batch, self.name)
            wishes = self._wishes(context, table, genes, history, seen)
            if not wishes:
                wishes = stratified(context, context.batch_size, generator)
            fresh = fresh_batch(context, wishes, seen, generator)
            if not fresh:
                return
            history += context.evaluate([context.space.decode(genome) for genome in fresh])
            batch += 1

    def _wishes(
        self,
        context: Context,
        table: DistortionTable,
        genes: GeneTable,
        history: Sequence[Evaluation],
        seen: set[Candidate],
    ) -> list[Genome]:
        """One proposal per gap in turn, until the batch is full."""
        front = front_of(history, context.budgets)
        sources = [
            _fill(context, table, genes, history, front[at], front[at + 1])
            for _, at in gaps(front)[: self.settings.gaps]
        ]
        wishes: dict[Genome, None] = {}
        while sources and len(wishes) < context.batch_size:
            for source in list(sources):
                genome = next((g for g in source if g not in wishes), None)
                if genome is None:
                    sources.remove(source)
                elif _is_new(context, genome, seen):
                    wishes[genome] = None
        return list(wishes)[: context.batch_size]


def _is_new(context: Context, genome: Genome, seen: set[Candidate]) -> bool:
    candidate = context.space.decode(genome)
    return candidate not in seen and within(context.budgets, context.cost_of(candidate))


def _fill(
    context: Context,
    table: DistortionTable,
    genes: GeneTable,
    history: Sequence[Evaluation],
    small: Evaluation,
    large: Evaluation,
) -> Iterator[Genome]:
    """Proposals between two neighbours of the front, best first, without end of usefulness."""
    space = context.space
    middle = float(np.sqrt(small.size_bytes * large.size_bytes))
    weights = fitted_weights(space, genes, history, middle)
    program = Program(context, table.rescaled(weights.tolist()))
    for size in (middle, large.size_bytes - 1.0):
        solved = program.solve(size)
        if solved is not None:
            yield space.encode(solved)
    moves: list[tuple[float, Genome]] = []
    for end in (small, large):
        moves += _moves(genes, weights, space.encode(end.candidate), end.loss, small, large)
    for _, genome in sorted(moves, key=lambda move: -move[0]):
        yield genome


def _moves(
    genes: GeneTable,
    weights: NDArray[np.float64],
    genome: Genome,
    loss: float,
    small: Evaluation,
    large: Evaluation,
) -> list[tuple[float, Genome]]:
    """(predicted gain, genome) of single moves and swaps that should land inside the gap.

    The gain is the area in log2(size) x log10(loss) that the point would add.
    """
    steps = _steps(genes, weights, genome)
    if not steps:
        return []
    gene, sign, d_size, d_loss = (np.array(column) for column in zip(*steps, strict=True))
    ups, downs = np.flatnonzero(sign > 0), np.flatnonzero(sign < 0)
    first = np.concatenate([np.arange(len(gene)), np.repeat(ups, len(downs))])
    second = np.concatenate([np.full(len(gene), -1), np.tile(downs, len(ups))])
    paired = second >= 0
    size = genes.size(genome) + d_size[first] + np.where(paired, d_size[second], 0.0)
    predicted = loss + d_loss[first] + np.where(paired, d_loss[second], 0.0)
    predicted = np.maximum(predicted, 0.5 * large.loss + 1e-12)
    gain = np.log2(large.size_bytes / np.maximum(size, 1.0)) * np.log10(
        max(small.loss, 1e-12) / predicted
    )
    inside = (size > small.size_bytes) & (size < large.size_bytes) & (predicted < small.loss)
    inside &= ~(paired & (gene[first] == gene[second]))
    best = np.flatnonzero(inside)[np.argsort(-gain[inside], kind="stable")][:64]
    found = []
    for at in best:
        moved = list(genome)
        for step in (first[at], second[at]) if paired[at] else (first[at],):
            moved[int(gene[step])] += int(sign[step])
        found.append((float(gain[at]), tuple(moved)))
    return found


def _steps(
    genes: GeneTable, weights: NDArray[np.float64], genome: Genome
) -> list[tuple[int, int, float, float]]:
    """(gene, +1 or -1, bytes gained, loss gained) of every legal single step."""
    steps = []
    for gene, at in enumerate(genome):
        loss, size = genes.losses_at(gene, genome), genes.sizes[gene]
        weight = weights[genes.group_of[gene]]
        for sign in (-1, 1):
            if 0 <= at + sign < len(loss):
                d_loss = weight * float(loss[at + sign] - loss[at])
                steps.append((gene, sign, float(size[at + sign] - size[at]), d_loss))
    return steps
