"""A static arena: when each value of a network is computed, and where it lies while it is alive."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.cells import IN_PLACE, VIEWS, Cells, Lives, cells_of
from cost_models.order import Operation, Problem
from cost_models.placement import Placement, place
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph, refs_in
from quant_ops.per_graph import per_graph
from quant_ops.slots import Ids

Scratch = Callable[[Graph, Candidate, int], int]
_MAX_CHOICES = 64  # combinations of overwritten operands that are tried
_MAX_OPERATIONS, _MAX_ORDERS = 12, 200  # of networks that are laid out in every order


@dataclass(frozen=True)
class ArenaRules:
    """What a target's kernels ask of memory.

    Attributes:
        alignment: of every value and of the scratch memory, in bytes.
        element_bits: widths in which an element can be held, ascending; a value takes the
            smallest that holds its own width. Empty: elements are packed to the bit.
        scratch: (graph, candidate, node index) to the bytes that the node's kernel needs while it
            runs; None: nothing.
        views: operators whose value shares the memory of their first argument.
        in_place: operators whose kernel may overwrite an operand of at least the same bytes.
    """

    alignment: int = 1
    element_bits: tuple[int, ...] = ()
    scratch: Scratch | None = None
    views: Set[str] = VIEWS
    in_place: Set[str] = IN_PLACE


@dataclass(frozen=True)
class Arena:
    """A layout of one sample's values in a single array of bytes.

    Attributes:
        offsets: node name to the first byte of its value. A view and a fused activation function
            have the offset of their source; sizes (no tensors) have none.
        sizes: node name to the bytes of its value, alignment included.
        scratch: node name to the first byte of its scratch memory, for the nodes that need some.
        order: names of the nodes as they run.
        total_bytes: length of the array.
        live_bytes: largest sum of what is alive during one node: no layout in this order can be
            shorter.
        is_optimal: whether no layout in any order is shorter, as far as that is proven.
    """

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    scratch: Mapping[str, int]
    order: tuple[str, ...]
    total_bytes: int
    live_bytes: int
    is_optimal: bool


def plan_arena(graph: Graph, candidate: Candidate, rules: ArenaRules | None = None) -> Arena:
    """The shortest arena that was found for one sample, values alive from write to last read.

    Nodes run in the order of the graph, or in another in which less is alive. Network inputs are
    alive from the start and never overwritten, outputs stay to the end. Small networks are laid
    out optimally; for others `is_optimal` says whether the layout is known to be.

    Args:
        graph: the folded network, without the unused residual layers of `quant_ops.dual`.
        candidate: activation widths; channels that it removes take no memory.
        rules: of the target; by default packed to the bit, unaligned, without scratch memory.
    """
    rules = rules or ArenaRules()
    cells = cells_of(graph, rules.views, rules.in_place)
    n_bytes = _aligned(_bytes_of(graph, candidate, cells, rules), rules.alignment)
    scratch = _scratch(graph, candidate, rules)
    best = _shortest(_Sizes(cells, n_bytes, scratch), _problem(graph, cells, n_bytes, scratch))
    offsets = _offsets_of_cells(cells, best.takes, best.placement.offsets)
    names = [node.name for node in graph.nodes]
    held = [(n, c) for n, c in zip(names, cells.of_node, strict=True) if c is not None]
    n_chains = len(best.placement.offsets) - len(scratch)
    return Arena(
        offsets={name: offsets[cell] for name, cell in held},
        sizes={name: int(n_bytes[cell]) for name, cell in held},
        scratch={
            names[node]: best.placement.offsets[n_chains + at]
            for at, (node, _) in enumerate(scratch)
        },
        order=tuple(names[node] for node in best.order),
        total_bytes=best.placement.total,
        live_bytes=best.live,
        is_optimal=best.placement.is_optimal,
    )


@dataclass(frozen=True, eq=False)
class _Sizes:
    """What is laid out: cells, their bytes, (node, bytes) of scratch memory."""

    cells: Cells
    n_bytes: Ids
    scratch: Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class _Layout:
    """The best placement in one order, the overwriting that it takes, a bound for the order."""

    order: tuple[int, ...]
    placement: Placement
    takes: "Takes"
    live: int


def _problem(
    graph: Graph, cells: Cells, n_bytes: Ids, scratch: Sequence[tuple[int, int]]
) -> Problem:
    needs, takes = dict(scratch), dict(cells.takes)
    heads = {head: cell for cell, head in enumerate(cells.heads)}
    operations = [
        Operation(
            after=after,
            uses=cells.uses[index],
            scratch=needs.get(index, 0),
            overwrites=takes.get(heads.get(index, -1), ()),
        )
        for index, after in enumerate(_operands(graph))
    ]
    return Problem(tuple(operations), tuple(n_bytes.tolist()), cells.given, cells.kept)


@per_graph
def _operands(graph: Graph) -> list[frozenset[int]]:
    """Per node those whose values it needs."""
    return [frozenset(ref.index for ref in refs_in(node.args)) for node in graph.nodes]


def _shortest(sizes: _Sizes, problem: Problem) -> _Layout:
    """The order of the graph if no other is known to be better.

    A layout as short as the least that is alive in any order is optimal; where there is none, small
    networks are laid out in every order in which less is alive than the best layout takes.
    """
    least = problem.least_live()
    best = _laid_out(sizes, tuple(range(len(problem.operations))))
    if best.placement.total > least.live_bytes:
        best = min(best, _laid_out(sizes, least.order), key=lambda found: found.placement.total)
    proven = least.is_optimal and best.placement.total == least.live_bytes
    if proven or len(problem.operations) > _MAX_OPERATIONS:
        return _known(best, proven)
    proven = True
    for tried, order in enumerate(problem.orders(best.placement.total)):
        if tried == _MAX_ORDERS:
            return _known(best, False)
        found = _laid_out(sizes, order)
        proven &= found.placement.is_optimal
        best = min(best, found, key=lambda found: found.placement.total)
        if best.placement.total == least.live_bytes:
            return _known(best, least.is_optimal)
    return _known(best, proven)


def _known(layout: _Layout, is_optimal: bool) -> _Layout:
    return replace(layout, placement=replace(layout.placement, is_optimal=is_optimal))


def _bytes_of(graph: Graph, candidate: Candidate, cells: Cells, rules: ArenaRules) -> Ids:
    elements = cells.kept_elements(graph, candidate)
    bits = cells.widths(candidate.activation_bits)
    if rules.element_bits:
        held = np.asarray(rules.element_bits)
        bits = held[np.searchsorted(held, bits).clip(max=held.size - 1)]
    return -(-elements * bits // 8)


def _aligned(n_bytes: Ids, alignment: int) -> Ids:
    return -(-n_bytes // alignment) * alignment


def _scratch(graph: Graph, candidate: Candidate, rules: ArenaRules) -> list[tuple[int, int]]:
    """(node, bytes) of the nodes that need some."""
    if rules.scratch is None:
        return []
    needs = [rules.scratch(graph, candidate, node) for node in range(len(graph.nodes))]
    aligned = _aligned(np.asarray(needs, np.int64), rules.alignment)
    return [(node, int(n)) for node, n in enumerate(aligned) if n]


Takes = dict[int, int]  # cell to the cell whose place it takes


def _laid_out(sizes: _Sizes, order: tuple[int, ...]) -> _Layout:
    """The best placement in an order over the choices of overwritten operands."""
    lives = sizes.cells.lives(order)
    best: tuple[Placement, Takes] | None = None
    live, n_tried, all_proven = None, 0, True
    for takes in _choices(lives, sizes.n_bytes):
        profiles = _profiles(sizes, lives, order, takes)
        if live is None:  # the first choice overwrites wherever it can
            live = int(profiles.sum(axis=0).max(initial=0))
        found = place(profiles, live)
        all_proven &= found.is_optimal
        if best is None or found.total < best[0].total:
            best = found, takes
        n_tried += 1
        if best[0].total == live or n_tried == _MAX_CHOICES:
            break
    assert best is not None
    assert live is not None
    proven = best[0].total == live or (all_proven and n_tried < _MAX_CHOICES)
    return _Layout(order, replace(best[0], is_optimal=proven), best[1], live)


def _choices(lives: Lives, n_bytes: Ids) -> Iterator[Takes]:
    options = [[s for s in sources if n_bytes[s] >= n_bytes[cell]] for cell, sources in lives.takes]
    for chosen in itertools.product(*([*sources, None] for sources in options)):
        pairs = zip(lives.takes, chosen, strict=True)
        yield {cell: source for (cell, _), source in pairs if source is not None}


def _chains(cells: Cells, takes: Takes) -> list[int]:
    """Number of the chain of each cell: cells that follow each other in one place."""
    chain: list[int] = []
    n_chains = 0
    for cell in range(len(cells.heads)):
        source = takes.get(cell)
        if source is None:
            chain.append(n_chains)
            n_chains += 1
        else:
            chain.append(chain[source])
    return chain


def _profiles(sizes: _Sizes, lives: Lives, order: Sequence[int], takes: Takes) -> NDArray[np.int64]:
    """(chains and scratch areas, steps): bytes in use of each while each node runs."""
    chain = _chains(sizes.cells, takes)
    n_chains = max(chain, default=-1) + 1
    profiles = np.zeros((n_chains + len(sizes.scratch), len(order)), np.int64)
    for cell, size in enumerate(sizes.n_bytes):
        row = profiles[chain[cell], lives.first[cell] : lives.last[cell] + 1]
        np.maximum(row, size, out=row)
    step_of = {node: step for step, node in enumerate(order)}
    for at, (node, size) in enumerate(sizes.scratch):
        profiles[n_chains + at, step_of[node]] = size
    return profiles


def _offsets_of_cells(cells: Cells, takes: Takes, offsets: Sequence[int]) -> list[int]:
    return [offsets[chain] for chain in _chains(cells, takes)]
