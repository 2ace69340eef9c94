"""Turning wishes into useful batches: inside the budgets, not seen before."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from search.cheapest import cheapest
from search.evaluation import excess, within
from search.strategy import Context

MUTATIONS = 40  # tries to leave a point that is known, before the proposal is dropped

Genome = tuple[int, ...]


def repair(
    context: Context,
    genome: Sequence[int],
    generator: np.random.Generator,
    budgets: Mapping[str, float] | None = None,
) -> Genome:
    """Narrow randomly drawn genes, one position at a time, until the run's (or these) budgets hold.

    The number of steps is found by bisection, since costs fall along the path. If not even the
    narrowest candidate fits, the cheapest by the budget that it misses most takes its place, as a
    narrow kernel can be a slow one; if that one does not fit either, it is returned. Costs are
    computed, nothing is run.
    """
    limits = context.budgets if budgets is None else budgets

    def fits(at: Sequence[int]) -> bool:
        return within(limits, context.cost_of(context.space.decode(at)))

    genome = tuple(genome)
    if fits(genome):
        return genome
    order = generator.permutation(np.repeat(np.arange(len(genome)), genome))
    low, high = 0, len(order)
    if not fits(_moved(genome, order, -1)):
        return _toward_cheapest(context, genome, generator, limits)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(_moved(genome, order[:middle], -1)):
            high = middle
        else:
            low = middle
    return _moved(genome, order[:high], -1)


def _toward_cheapest(
    context: Context, genome: Genome, generator: np.random.Generator, limits: Mapping[str, float]
) -> Genome:
    """Set genes in random order to those of the cheapest candidate until the budgets hold."""
    over = excess(limits, context.cost_of(context.space.smallest()))
    worst = max(over, key=lambda name: over[name])
    best = cheapest(context.space, lambda c: context.cost_of(c)[worst], limits[worst])
    goal = context.space.encode(best)
    moved = list(genome)
    for gene in generator.permutation(len(genome)):
        moved[int(gene)] = goal[int(gene)]
        if within(limits, context.cost_of(context.space.decode(moved))):
            break
    return tuple(moved)


def widen(
    context: Context, genome: Sequence[int], size_bytes: float, generator: np.random.Generator
) -> Genome:
    """Widen randomly drawn genes while the file stays at or under `size_bytes`."""
    room = [len(w) - 1 - at for w, at in zip(context.space.gene_widths, genome, strict=True)]
    order = generator.permutation(np.repeat(np.arange(len(room)), room))
    low, high = 0, len(order) + 1
    while high - low > 1:
        middle = (low + high) // 2
        wider = context.space.decode(_moved(genome, order[:middle], 1))
        if context.size_of(wider) <= size_bytes:
            low = middle
        else:
            high = middle
    return _moved(genome, order[:low], 1)


def _moved(genome: Sequence[int], drawn: NDArray[np.intp], sign: int) -> Genome:
    """Every gene moved by as many positions as it was drawn."""
    counts = np.bincount(drawn, minlength=len(genome))
    return tuple((np.array(genome, dtype=int) + sign * counts).tolist())


def fresh_batch(
    context: Context,
    wishes: Iterable[Sequence[int]],
    seen: set[Candidate],
    generator: np.random.Generator,
) -> list[Genome]:
    """The wishes repaired; one that is known already is mutated until it is not.

    Fewer come back where no unseen neighbour is found. `seen` grows by what is returned.
    """
    batch: list[Genome] = []
    for wish in wishes:
        genome = repair(context, wish, generator)
        for _ in range(MUTATIONS):
            if context.space.decode(genome) not in seen:
                seen.add(context.space.decode(genome))
                batch.append(genome)
                break
            genome = repair(context, mutate(context, genome, generator), generator)
    return batch


def mutate(context: Context, genome: Sequence[int], generator: np.random.Generator) -> Genome:
    """One random gene that has a choice moves one position, and with even odds another follows."""
    widths = context.space.gene_widths
    free = [i for i, legal in enumerate(widths) if len(legal) > 1]
    moved = list(genome)
    if not free:
        return tuple(moved)
    for _ in range(1 + int(generator.integers(2))):
        gene = free[int(generator.integers(len(free)))]
        up = moved[gene] == 0 or (
            moved[gene] < len(widths[gene]) - 1 and bool(generator.integers(2))
        )
        moved[gene] += 1 if up else -1
    return tuple(moved)
