"""Losses of pairs of layers inside a block, where the sum of single losses can be far off.

What two layers of a residual block do together is not the sum of what each does alone. A second
table holds loss(pair) - loss(a) - loss(b) where it can matter; the program stays exact, since a
block with such terms becomes one group whose choices are the products of its layers' widths.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from quant_ops.blocks import split_into_blocks
from quant_ops.candidate import Candidate
from search.allocation import Choice, sweep, total, undominated
from search.strategies.distortion import DistortionTable
from search.strategy import Context

SHARE = 0.05  # of the whole loss: what a pair term has to be able to add to be worth a probe
LEAST = 0.002  # of the worst single loss: where all layers together lose less, nothing is narrow
MOST_PROBES = 2  # times those of single layers
MOST_PRODUCTS = 4096  # choices of one block
ROUNDS = 3  # of probing what is near the front and correcting it


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Two groups of the distortion table, and one choice of each."""

    groups: tuple[int, int]
    choices: tuple[int, int]


@dataclass(frozen=True)
class BlockTable:
    """A distortion table whose groups are blocks: each choice is one width per layer of it.

    Attributes:
        table: of single layers.
        members: per block, the groups of `table` that it holds.
        products: per block (choices, members), positions in the members' widths.
        losses, costs: as those of `table`; dominated products are left out.
    """

    table: DistortionTable
    members: tuple[tuple[int, ...], ...]
    products: tuple[NDArray[np.intp], ...]
    losses: tuple[NDArray[np.float64], ...]
    costs: Mapping[str, tuple[NDArray[np.float64], ...]]

    def candidate(self, choice: Sequence[int]) -> Candidate:
        """The candidate of one choice per block."""
        return self.table.candidate(self.flat(choice))

    def flat(self, choice: Sequence[int]) -> Choice:
        """One choice per group of the single-layer table."""
        out = [0] * len(self.table.losses)
        for groups, products, at in zip(self.members, self.products, choice, strict=True):
            for group, position in zip(groups, products[at], strict=True):
                out[group] = int(position)
        return tuple(out)

    def limits(self, budgets: Mapping[str, float]) -> dict[str, float]:
        """The budgets as limits on the sums of differences."""
        return self.table.limits(budgets)


def with_pairs(context: Context, table: DistortionTable) -> BlockTable:
    """Probe the pairs that can matter and put each block's terms into one group.

    As in [Li2021] single losses and those of layers of one block at narrow widths are measured,
    all else is taken to add up. Departures: pairs only, for any number of layers; narrow is not a
    fixed 2 bits but where the terms can matter (see `worthwhile`); the answer is the program's
    optimum, not a genetic algorithm's. What is near the corrected front is probed in turn, so that
    the program does not flee to pairs that nobody measured; all in all at most twice the probes
    that single layers took.
    """
    blocks = _blocks(context, table)
    left = MOST_PROBES * sum(len(group) for group in table.losses if len(group) > 1)
    terms: dict[PairChoice, float] = {}
    corrected = block_table(table, terms)
    for _ in range(ROUNDS):
        pairs = [pair for pair in worthwhile(corrected, blocks) if pair not in terms][:left]
        if not pairs:
            break
        changes = [_change(table, pair) for pair in pairs]
        for pair, loss in zip(pairs, context.probe(changes), strict=True):
            terms[pair] = _term(table, pair, loss)
        left -= len(pairs)
        corrected = block_table(table, terms)
    return corrected


def worthwhile(corrected: BlockTable, blocks: Sequence[Sequence[int]]) -> list[PairChoice]:
    """The pairs of choices worth a probe, most so first.

    Were the loss quadratic, a pair could add at most 2 sqrt(loss_a loss_b). A pair is worth as
    much as the largest share that this is of the whole predicted loss, over all points of the
    front that are within one width of both choices; points that are useless or lose
    nearly nothing are no reason to probe.
    """
    table = corrected.table
    worst = max((float(group.max()) for group in table.losses), default=0.0)
    front = [
        (corrected.flat(choice), loss)
        for choice in sweep(corrected.losses, corrected.costs["size_bytes"])
        if LEAST * worst <= (loss := total(corrected.losses, choice)) <= worst and loss > 0
    ]
    worth: dict[PairChoice, float] = {}
    for g, h in _joinable(table, blocks, front):
        bound = 2 * np.sqrt(np.outer(table.losses[g], table.losses[h]))
        for choice, loss in front:
            for i, j in _around(choice[g], choice[h], bound.shape):
                pair = PairChoice((g, h), (i, j))
                worth[pair] = max(worth.get(pair, 0.0), float(bound[i, j]) / loss)
    useful = [pair for pair, share in worth.items() if share >= SHARE]
    return sorted(useful, key=lambda pair: (-worth[pair], pair.groups, pair.choices))


def block_table(table: DistortionTable, terms: Mapping[PairChoice, float]) -> BlockTable:
    """Groups that share a term as one group; the others as they are."""
    members = _components(len(table.losses), [pair.groups for pair in terms])
    products, losses = [], []
    costs: dict[str, list[NDArray[np.float64]]] = {name: [] for name in table.costs}
    for groups in members:
        sizes = [len(table.losses[g]) for g in groups]
        product = np.indices(sizes).reshape(len(sizes), -1).T
        loss = _summed(table.losses, groups, product)
        for pair, term in terms.items():
            if pair.groups[0] in groups:
                columns = product[:, [groups.index(g) for g in pair.groups]]
                loss[(columns == pair.choices).all(axis=1)] += term
        loss = np.maximum(loss, 0.0)
        cost = {name: _summed(table.costs[name], groups, product) for name in table.costs}
        kept = np.arange(len(product))
        if len(groups) > 1:
            kept = undominated(loss, list(cost.values()))
        products.append(product[kept])
        losses.append(loss[kept])
        for name in costs:
            costs[name].append(cost[name][kept])
    tables = {name: tuple(values) for name, values in costs.items()}
    return BlockTable(table, tuple(members), tuple(products), tuple(losses), tables)


def _change(table: DistortionTable, pair: PairChoice) -> dict[str, float]:
    first, second = (
        table.groups[g].change(at) for g, at in zip(pair.groups, pair.choices, strict=True)
    )
    return first | second


def _blocks(context: Context, table: DistortionTable) -> list[list[int]]:
    """Per block the groups of its layers that have a choice."""
    free = {g.names[0]: at for at, g in enumerate(table.groups) if len(g.choices) > 1}
    blocks = split_into_blocks(context.space.graph)
    return [[free[name] for name in block.layers if name in free] for block in blocks]


def _joinable(
    table: DistortionTable,
    blocks: Sequence[Sequence[int]],
    front: Sequence[tuple[Choice, float]],
) -> Iterator[tuple[int, int]]:
    """Pairs of layers of a block, those that can matter most first, while its product is small."""
    for block in blocks:
        reach = {
            (g, h): max(
                (float(table.losses[g][c[g]] * table.losses[h][c[h]]) / loss**2
                 for c, loss in front),
                default=0.0,
            )
            for g, h in combinations(sorted(block), 2)
        }  # fmt: skip
        taken: list[tuple[int, int]] = []
        for pair in sorted(reach, key=lambda p: (-reach[p], p)):
            joined = _components(len(table.losses), [*taken, pair])
            sizes = [np.prod([len(table.losses[g]) for g in groups]) for groups in joined]
            if max(sizes) <= MOST_PRODUCTS:
                taken.append(pair)
        yield from taken


def _around(i: int, j: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for a in range(max(0, i - 1), min(shape[0], i + 2)):
        for b in range(max(0, j - 1), min(shape[1], j + 2)):
            yield a, b


def _term(table: DistortionTable, pair: PairChoice, loss: float) -> float:
    single = sum(table.losses[g][at] for g, at in zip(pair.groups, pair.choices, strict=True))
    return float(loss - single) if np.isfinite(loss) else 0.0


def _summed(
    values: Sequence[NDArray[np.float64]], groups: Sequence[int], product: NDArray[np.intp]
) -> NDArray[np.float64]:
    out = np.zeros(len(product))
    for column, group in enumerate(groups):
        out += values[group][product[:, column]]
    return out


def _components(n: int, links: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """0..n-1 parted into what the links hold together, in order of the first of each."""
    part = list(range(n))
    for a, b in links:
        old, new = max(part[a], part[b]), min(part[a], part[b])
        part = [new if p == old else p for p in part]
    return [tuple(g for g in range(n) if part[g] == p) for p in sorted(set(part))]
