"""A static arena: where each value of a network lies while it is alive."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.cells import IN_PLACE, VIEWS, Cells, cells_of
from cost_models.placement import Placement, place
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph
from quant_ops.slots import Ids

Scratch = Callable[[Graph, Candidate, int], int]
_MAX_CHOICES = 64  # combinations of overwritten operands that are tried


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
        total_bytes: length of the array.
        live_bytes: largest sum of what is alive during one node: no layout can be shorter.
        is_optimal: whether no layout in this execution order is shorter, as far as that is proven.
    """

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    scratch: Mapping[str, int]
    total_bytes: int
    live_bytes: int
    is_optimal: bool


def plan_arena(graph: Graph, candidate: Candidate, rules: ArenaRules | None = None) -> Arena:
    """The shortest arena that was found for one sample, values alive from write to last read.

    Nodes run in the order of the graph. Network inputs are alive from the start and never
    overwritten, outputs stay to the end. Small networks are laid out optimally; for others
    `is_optimal` says whether the layout is known to be.

    Args:
        graph: the folded network, without the unused residual layers of `quant_ops.dual`.
        candidate: activation widths; channels that it removes take no memory.
        rules: of the target; by default packed to the bit, unaligned, without scratch memory.
    """
    rules = rules or ArenaRules()
    cells = cells_of(graph, rules.views, rules.in_place)
    n_bytes = _aligned(_bytes_of(graph, candidate, cells, rules), rules.alignment)
    scratch = _scratch(graph, candidate, rules)
    best, takes, live = _best(graph, cells, n_bytes, scratch)
    offsets = _offsets_of_cells(cells, takes, best.offsets)
    names = [node.name for node in graph.nodes]
    held = [(n, c) for n, c in zip(names, cells.of_node, strict=True) if c is not None]
    n_chains = len(best.offsets) - len(scratch)
    return Arena(
        offsets={name: offsets[cell] for name, cell in held},
        sizes={name: int(n_bytes[cell]) for name, cell in held},
        scratch={names[node]: best.offsets[n_chains + at] for at, (node, _) in enumerate(scratch)},
        total_bytes=best.total,
        live_bytes=live,
        is_optimal=best.is_optimal,
    )


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


def _best(
    graph: Graph, cells: Cells, n_bytes: Ids, scratch: Sequence[tuple[int, int]]
) -> tuple[Placement, Takes, int]:
    """The best placement over the choices of overwritten operands, its choice, a lower bound."""
    best: tuple[Placement, Takes] | None = None
    live, n_tried, all_proven = None, 0, True
    for takes in _choices(cells, n_bytes):
        profiles = _profiles(len(graph.nodes), cells, n_bytes, scratch, takes)
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
    return Placement(best[0].offsets, best[0].total, proven), best[1], live


def _choices(cells: Cells, n_bytes: Ids) -> Iterator[Takes]:
    options = [[s for s in sources if n_bytes[s] >= n_bytes[cell]] for cell, sources in cells.takes]
    for chosen in itertools.product(*([*sources, None] for sources in options)):
        pairs = zip(cells.takes, chosen, strict=True)
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


def _profiles(
    n_nodes: int, cells: Cells, n_bytes: Ids, scratch: Sequence[tuple[int, int]], takes: Takes
) -> NDArray[np.int64]:
    """(chains and scratch areas, nodes): bytes in use of each while each node runs."""
    chain = _chains(cells, takes)
    n_chains = max(chain, default=-1) + 1
    profiles = np.zeros((n_chains + len(scratch), n_nodes), np.int64)
    for cell, size in enumerate(n_bytes):
        row = profiles[chain[cell], cells.first[cell] : cells.last[cell] + 1]
        np.maximum(row, size, out=row)
    for at, (node, size) in enumerate(scratch):
        profiles[n_chains + at, node] = size
    return profiles


def _offsets_of_cells(cells: Cells, takes: Takes, offsets: Sequence[int]) -> list[int]:
    return [offsets[chain] for chain in _chains(cells, takes)]
