"""Values of a network that share one piece of memory, and when each is alive."""

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from quant_ops.candidate import Candidate
from quant_ops.channels import analyse
from quant_ops.edges import FUSIBLE, edge_of
from quant_ops.graph import Graph, Ref, refs_in
from quant_ops.index_maps import varying_axes
from quant_ops.operator_kinds import MOVES, POINTWISE, SUMS, ZERO_KEEPING
from quant_ops.operators import CONV, CONV_TRANSPOSE, LINEAR
from quant_ops.per_graph import per_graph
from quant_ops.removal import plan_removal
from quant_ops.slots import Ids

# A copy-free look at another value.
VIEWS = frozenset(MOVES - {"cat.default", "stack.default", "repeat.default", "flip.default"}) - {
    "roll.default", "pixel_unshuffle.default", "channel_shuffle.default",
} | {"getitem"}  # fmt: skip
IN_PLACE = (
    ZERO_KEEPING | POINTWISE | SUMS | {"mul.Tensor", "div.Tensor", "prelu.default"}
    | {"bitfront.channel_affine", "batch_norm.default"}
) - {"_to_copy.default", "to.dtype"}  # fmt: skip
_FUSES_ACTIVATION = CONV | CONV_TRANSPOSE | LINEAR | {"add.Tensor", "sub.Tensor"}


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells are values that share one piece of memory and one width.

    Attributes:
        of_node: cell of every node's value, None for a size.
        heads: index of the node that each cell starts with.
        elements: per cell, for one sample.
        float_bits: bits per element of each cell when it is not quantized.
        edges: per cell the edge that states its width, if any.
        uses: per node the cells that it writes or reads.
        given, kept: cells of the network's inputs, and of its outputs.
        takes: (cell, cells whose place it may take if its head reads them last).
        components, starts, n_slots: sets of tied channels along each cell's channel axis, one
            cell after the other; where each cell starts; how many it has.
    """

    of_node: tuple[int | None, ...]
    heads: tuple[int, ...]
    elements: Ids
    float_bits: Ids
    edges: tuple[str | None, ...]
    uses: tuple[tuple[int, ...], ...]
    given: frozenset[int]
    kept: frozenset[int]
    takes: tuple[tuple[int, tuple[int, ...]], ...]
    components: Ids
    starts: Ids
    n_slots: Ids

    def lives(self, order: Sequence[int]) -> "Lives":
        """When cells are in use if nodes run in an order."""
        n, last_step = len(self.heads), len(order) - 1
        first, last = [len(order)] * n, [0] * n
        for step, node in enumerate(order):
            for cell in self.uses[node]:
                first[cell], last[cell] = min(first[cell], step), step
        for cell in self.given:
            first[cell] = 0
        for cell in self.kept:
            last[cell] = last_step
        step_of = {node: step for step, node in enumerate(order)}
        takes = []
        for cell, sources in self.takes:
            step = step_of[self.heads[cell]]
            left = tuple(s for s in sources if last[s] == step and s not in self.kept)
            if left:
                takes.append((cell, left))
        return Lives(np.array(first, np.int64), np.array(last, np.int64), tuple(takes))

    def widths(self, activation_bits: dict[str, int]) -> Ids:
        """Bits per element of each cell."""
        bits = self.float_bits.copy()
        for cell, edge in enumerate(self.edges):
            if edge in activation_bits:
                bits[cell] = activation_bits[edge]
        return bits

    def kept_elements(self, graph: Graph, candidate: Candidate) -> Ids:
        """Elements of each cell without the channels that the candidate removes."""
        removal = plan_removal(graph, candidate)
        if not removal:
            return self.elements
        kept = np.add.reduceat(~removal.removed[self.components], self.starts)
        return self.elements // self.n_slots * kept


@dataclass(frozen=True, eq=False)
class Lives:
    """Cells in one order of execution.

    Attributes:
        first, last: first and last step during which a cell is in use.
        takes: (cell, cells that nothing reads after its head and whose place it may take).
    """

    first: Ids
    last: Ids
    takes: tuple[tuple[int, tuple[int, ...]], ...]


def cells_of(graph: Graph, views: Set[str] = VIEWS, in_place: Set[str] = IN_PLACE) -> Cells:
    """The cells of a network, computed once per graph and pair of operator sets.

    Args:
        graph: the network.
        views: operators whose value shares the memory of their first argument.
        in_place: operators that may overwrite an operand that nobody reads later.
    """
    known, key = _known(graph), (frozenset(views), frozenset(in_place))
    if key not in known:
        known[key] = _find(graph, views, in_place)
    return known[key]


@per_graph
def _known(graph: Graph) -> dict[tuple[frozenset[str], frozenset[str]], Cells]:
    return {}


def _find(graph: Graph, views: Set[str], in_place: Set[str]) -> Cells:
    of_node, heads = _cells(graph, views)
    tails = {cell: index for index, cell in enumerate(of_node) if cell is not None}
    vectors = [_components(graph, head) for head in heads]
    n_slots = np.array([v.size for v in vectors], np.int64)
    return Cells(
        of_node=tuple(of_node),
        heads=tuple(heads),
        elements=np.array([math.prod(graph.nodes[h].shape) for h in heads], np.int64),
        float_bits=np.array([_bits_of(graph.nodes[h].dtype) for h in heads], np.int64),
        edges=tuple(edge_of(graph, tails[cell]) for cell in range(len(heads))),
        uses=tuple(_uses(graph, of_node, index) for index in range(len(graph.nodes))),
        given=frozenset(_present(of_node, graph.input_nodes)),
        kept=frozenset(_present(of_node, (ref.index for ref in graph.outputs))),
        takes=_takes(graph, of_node, heads, in_place),
        components=np.concatenate(vectors),
        starts=np.cumsum(n_slots) - n_slots,
        n_slots=n_slots,
    )


def _bits_of(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return 8 * kind.itemsize


def _components(graph: Graph, index: int) -> Ids:
    analysis = analyse(graph)
    value = analysis.maps.values[index]
    ids = value[0] if isinstance(value, tuple) else value
    if not isinstance(ids, np.ndarray) or len(varying_axes(ids)) != 1:
        return np.zeros(1, np.int64)  # the pinned set: nothing leaves
    return analysis.component[ids.reshape(-1)]


def _cells(graph: Graph, views: Set[str]) -> tuple[list[int | None], list[int]]:
    """Cell of every node, and the node that each cell starts with."""
    cell_of: list[int | None] = []
    heads: list[int] = []
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], Ref) else None
        if not node.dtype:
            cell_of.append(None)
        elif source is not None and (node.op in views or _is_fused(graph, node.op, source.index)):
            cell_of.append(cell_of[source.index])
        else:
            cell_of.append(len(heads))
            heads.append(len(cell_of) - 1)
    return cell_of, heads


def _is_fused(graph: Graph, op: str, source: int) -> bool:
    return (
        op in FUSIBLE
        and graph.nodes[source].op in _FUSES_ACTIVATION
        and len(graph.consumers[source]) == 1
        and Ref(source) not in graph.outputs
    )


def _uses(graph: Graph, cell_of: Sequence[int | None], index: int) -> tuple[int, ...]:
    """Cells of a node's value and of what it reads; a size reads no memory."""
    if not graph.nodes[index].dtype:
        return ()
    read = (ref.index for ref in refs_in(graph.nodes[index].args))
    return tuple(dict.fromkeys(_present(cell_of, (index, *read))))


def _present(cell_of: Sequence[int | None], nodes: Iterable[int]) -> list[int]:
    return [cell for node in nodes if (cell := cell_of[node]) is not None]


def _takes(
    graph: Graph, cell_of: Sequence[int | None], heads: Sequence[int], in_place: Set[str]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found = []
    for cell, head in enumerate(heads):
        node = graph.nodes[head]
        refs = refs_in(node.args) if node.op in in_place else ()
        sources = {
            source: None
            for ref in refs
            if (source := cell_of[ref.index]) is not None and _can_take(graph, ref, head)
        }
        if sources:
            found.append((cell, tuple(sources)))
    return tuple(found)


def _can_take(graph: Graph, ref: Ref, taker: int) -> bool:
    source, node = graph.nodes[ref.index], graph.nodes[taker]
    return source.op != "input" and (source.shape, source.dtype) == (node.shape, node.dtype)
