"""Limits that widths cannot meet, as multiply-accumulates: what removing channels frees of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from agents.importance import SCORE_FLOOR, Importance, ties_of
from agents.layer_facts import Floats, Ints, LayerFacts
from search.space import SearchSpace
from search.strategy import Context

UNMOVED = 0.99  # a cost that keeps so much of itself at the narrowest widths only pruning lowers


@dataclass(frozen=True, eq=False)
class Structure:
    """Genes that leave together, and what that frees of the limits that only pruning can meet.

    What is freed is counted as a share of what has to go, so that 1 meets the limits; several
    limits count alike. It is exact for one set alone; of sets that share a product of channels
    together it is a little too much.

    Attributes:
        costs: names of those limits.
        sets: genes that leave together, those that lose least for what they free first.
        level: (genes,) half the binary logarithm of the importance of the gene's set per share
            freed: bits, as priors; infinite for genes that free nothing.
        frees: (genes,) share that the gene's set frees, divided among its genes.
    """

    costs: tuple[str, ...]
    sets: tuple[Ints, ...]
    level: Floats
    frees: Floats

    @classmethod
    def of(
        cls, context: Context, importance: Importance, layers: Sequence[LayerFacts]
    ) -> "Structure | None":
        """What the run's budgets ask for; None where widths can meet them or nothing is over."""
        space = context.space
        over = _over(context)
        if not over:
            return None
        weight = np.concatenate([x.scores * importance.levels[x.name] for x in layers])
        floor = SCORE_FLOOR * float(weight.mean())
        found: list[tuple[float, list[int], float]] = []
        for alike in _sets_by_layers(space, layers):
            freed = _freed(context, over, alike[: max(1, len(alike) // 2)])
            if freed > 0:
                worths = [max(float(weight[genes].sum()), floor) for genes in alike]
                found += [
                    (0.5 * float(np.log2(worth / freed)), genes, freed)
                    for worth, genes in zip(worths, alike, strict=True)
                ]
        found.sort()
        level = np.full(len(space.gene_widths), np.inf)
        frees = np.zeros(len(space.gene_widths))
        for bits, genes, freed in found:
            level[genes] = bits
            frees[genes] = freed / len(genes)
        sets = tuple(np.array(genes, np.intp) for _, genes, _ in found)
        return cls(tuple(over), sets, level, frees)

    def freed(self, genomes: Ints) -> Floats:
        """(n,) shares that (n, genes) genomes free; positions of 0 are taken for 0 bits."""
        return np.asarray((genomes == 0) @ self.frees)

    def trimmed(self, genomes: Ints) -> Ints:
        """(n, genes) genomes with sets removed, the least worth first, until nothing is over."""
        missing = 1.0 - self.freed(genomes)
        out = genomes.copy()
        genes, ends = self._in_order
        for row in np.flatnonzero(missing > 0) if len(genes) else ():
            gains = np.cumsum(self.frees[genes] * (out[row, genes] > 0))
            n = int(np.searchsorted(gains[ends - 1], missing[row]))
            out[row, genes[: ends[min(n, len(ends) - 1)]]] = 0
        return out

    @cached_property
    def _in_order(self) -> tuple[Ints, Ints]:
        """The genes of one set after the other, and where each ends."""
        genes = np.concatenate([np.zeros(0, np.intp), *self.sets]).astype(np.intp)
        return genes, np.cumsum([len(one) for one in self.sets])


@dataclass(frozen=True, eq=False)
class Ahead:
    """At which level the genes of this and later layers have to go.

    Attributes:
        levels: ascending levels of the genes ahead that free something.
        freed: what the genes up to each free together.
    """

    levels: Floats
    freed: Floats

    @classmethod
    def of(cls, structure: Structure, start: int) -> "Ahead":
        """For the genes from `start` on."""
        order = np.argsort(structure.level[start:], kind="stable")
        order = order[np.isfinite(structure.level[start:][order])]
        return cls(structure.level[start:][order], np.cumsum(structure.frees[start:][order]))

    def level_for(self, missing: Floats) -> Floats:
        """(n,) levels under which genes go, so that they free the (n,) `missing` shares."""
        if not len(self.levels):
            return np.full(len(missing), -np.inf)
        place = np.minimum(np.searchsorted(self.freed, missing), len(self.levels) - 1)
        # the gene that completes the share goes as well
        return np.where(missing > 0, np.nextafter(self.levels[place], np.inf), -np.inf)


def _sets_by_layers(space: SearchSpace, layers: Sequence[LayerFacts]) -> list[list[list[int]]]:
    """Genes that leave together, those of the same layers side by side."""
    may: set[int] = set()
    gene_of: dict[tuple[str, int], int] = {}
    for choice, layer in zip(space.layers, layers, strict=True):
        keeps_one = bool(choice.groups) and not choice.may_vanish
        going = layer.start + layer.going
        may |= set(going.tolist()) - ({layer.start + int(layer.order[-1])} if keeps_one else set())
        channels = range(space.graph.layer_of[choice.name].out_channels)
        for gene, group in enumerate(choice.groups or (tuple(channels),), layer.start):
            gene_of |= {(choice.name, channel): gene for channel in group}
    found: dict[tuple[str, ...], set[frozenset[int]]] = {}
    for tie in ties_of(space.graph):
        members = [member for member in tie.channels if member in gene_of]
        genes = frozenset(gene_of[member] for member in members)
        if tie.removable and genes and genes <= may:
            names = tuple(sorted({name for name, _ in members}))
            found.setdefault(names, set()).add(genes)
    return [sorted(map(sorted, sets)) for sets in found.values()]


def _over(context: Context) -> dict[str, tuple[float, float]]:
    """Cost name to (cost of the widest network, what has to go), of limits only pruning meets."""
    names = [name for name in context.budgets if name != "size_bytes"]
    if not names:
        return {}
    space = context.space
    largest = context.cost_of(space.largest())
    narrow = context.cost_of(space.decode(_narrowest(space)))
    return {
        name: (largest[name], largest[name] - context.budgets[name])
        for name in names
        if largest[name] > context.budgets[name] and narrow[name] > UNMOVED * largest[name]
    }


def _narrowest(space: SearchSpace) -> list[int]:
    """Every gene at the narrowest width that keeps it."""
    return [int(len(w) > 1 and w[0] == 0) for w in space.gene_widths]


def _freed(
    context: Context, over: Mapping[str, tuple[float, float]], sets: list[list[int]]
) -> float:
    """What one of these sets frees in the mean, when they leave together."""
    space = context.space
    genome = np.array([len(w) - 1 for w in space.gene_widths], np.intp)
    for genes in sets:
        genome[genes] = 0
    costs = context.cost_of(space.decode(genome.tolist()))
    shares = [(full - costs[name]) / surplus for name, (full, surplus) in over.items()]
    return float(np.mean(shares)) / len(sets)
