"""The candidate of least cost, for costs that do not always fall with the widths."""

from collections.abc import Callable

from quant_ops.candidate import Candidate
from search.space import SearchSpace

MAX_GENES = 400  # of spaces whose genes are tried one by one


def cheapest(
    space: SearchSpace, cost: Callable[[Candidate], float], limit: float = -float("inf")
) -> Candidate:
    """The cheapest of the uniform candidates, then improved gene by gene; the first within `limit`.

    A kernel for 2 bits may be slower than one for 4: the narrowest candidate is the smallest, but
    need not be the fastest.
    """
    widths = sorted({w for choice in space.layers for w in choice.bit_widths})
    best, least = space.smallest(), cost(space.smallest())
    for width in widths:
        if least <= limit:
            return best
        candidate = space.uniform(width)
        found = cost(candidate)
        if found < least:
            best, least = candidate, found
    genes = space.gene_widths
    if len(genes) > MAX_GENES:
        return best
    genome = list(space.encode(best))
    for gene, legal in enumerate(genes):
        for position in range(len(legal)):
            if least <= limit:
                return best
            changed = [*genome[:gene], position, *genome[gene + 1 :]]
            found = cost(space.decode(changed))
            if found < least:
                best, least, genome = space.decode(changed), found, changed
    return best
