"""Random candidates, spread evenly over log2 of the file size."""

import math

import numpy as np

from quant_ops.candidate import Candidate
from search.strategies.proposals import Genome, fresh_batch, repair, widen
from search.strategy import Context, Strategy, Traits, batch_generator


class RandomSearch(Strategy):
    """Uniformly drawn genes have sizes that crowd in the middle; here each batch covers the range.

    A batch cuts log2(size) into as many strata as it has candidates and draws one target in each;
    a random candidate is narrowed or widened at random genes until it is at the target.
    """

    name = "random"
    traits = Traits(
        "random widths, evenly over log size", granularity=("layer", "group", "channel")
    )

    def run(self, context: Context) -> None:
        seen: set[Candidate] = set()
        batch = 0
        while not context.should_stop():
            generator = batch_generator(context.seed, batch, self.name)
            wishes = stratified(context, context.batch_size, generator)
            fresh = fresh_batch(context, wishes, seen, generator)
            if not fresh:
                return
            context.evaluate([context.space.decode(genome) for genome in fresh])
            batch += 1


def stratified(context: Context, n: int, generator: np.random.Generator) -> list[Genome]:
    """`n` random genomes, one per stratum of log size, from smallest to largest."""
    space = context.space
    low = math.log2(context.size_of(space.smallest()))
    largest = context.size_of(space.largest())
    high = math.log2(max(min(largest, context.budgets.get("size_bytes", largest)), 2**low))
    genomes = []
    for stratum in range(n):
        target = 2 ** (low + (high - low) * (stratum + generator.random()) / n)
        drawn = [int(generator.integers(len(w))) for w in space.gene_widths]
        if context.size_of(space.decode(drawn)) <= target:
            genomes.append(widen(context, drawn, target, generator))
        else:
            budgets = {**context.budgets, "size_bytes": target}
            genomes.append(repair(context, drawn, generator, budgets))
    return genomes
