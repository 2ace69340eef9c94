"""Peak activation memory of the network in its execution order."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.base import CostModel, Kind
from quant_ops.candidate import Candidate
from quant_ops.channels import analyse
from quant_ops.dual import without_unused
from quant_ops.edges import FUSIBLE, edge_of
from quant_ops.graph import Graph, Ref, refs_in
from quant_ops.index_maps import varying_axes
from quant_ops.operator_kinds import MOVES, POINTWISE, SUMS, ZERO_KEEPING
from quant_ops.operators import CONV, CONV_TRANSPOSE, LINEAR
from quant_ops.per_graph import per_graph
from quant_ops.removal import plan_removal
from quant_ops.slots import Ids

# A copy-free look at another value.
_VIEWS = (MOVES - {"cat.default", "stack.default", "repeat.default", "flip.default"}) - {
    "roll.default", "pixel_unshuffle.default", "channel_shuffle.default",
} | {"getitem"}  # fmt: skip
_IN_PLACE = (
    ZERO_KEEPING | POINTWISE | SUMS | {"mul.Tensor", "div.Tensor", "prelu.default"}
    | {"bitfront.channel_affine", "batch_norm.default"}
) - {"_to_copy.default", "to.dtype"}  # fmt: skip
_FUSES_ACTIVATION = CONV | CONV_TRANSPOSE | LINEAR | {"add.Tensor", "sub.Tensor"}


class PeakMemory(CostModel):
    """Largest sum of the values that are alive while one operator runs, for one sample.

    A value takes 4 bytes per element, or its activation width in bits, rounded up to whole bytes
    per tensor. Views share the memory of their source, an activation function is computed with
    the layer or addition before it, and an elementwise operator overwrites an operand that
    nobody reads later. Weights, copies that a strided layout may need, and the scratch memory
    of operators do not count.
    """

    name: ClassVar[str] = "ram_bytes"
    budget_key: ClassVar[str] = "ram"
    unit: ClassVar[str] = "B"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        graph, candidate = without_unused(graph, candidate)
        plan = _plan(graph)
        removal = plan_removal(graph, candidate)
        elements = plan.elements
        if removal:
            kept = np.add.reduceat(~removal.removed[plan.components], plan.starts)
            elements = plan.elements // plan.n_slots * kept
        bits = plan.float_bits
        if candidate.activations:
            bits = plan.widths(candidate.activation_bits)
        n_bytes = -(-elements * bits // 8)
        in_use = plan.alive @ n_bytes
        in_use[plan.steps] -= np.minimum(n_bytes[plan.overwritten], n_bytes[plan.written])
        return float(in_use.max(initial=0))


@dataclass(frozen=True, eq=False)
class _Plan:
    """Cells are values that share one piece of memory and one width.

    Attributes:
        elements: per cell, for one sample.
        float_bits: bits per element of each cell when it is not quantized.
        edges: per cell the edge that states its width, if any.
        alive: (nodes, cells), 1 where a cell is in use while a node runs.
        steps, overwritten, written: nodes that work in place, the cell that each reads for the
            last time and the cell that it puts in its place.
        components, starts, n_slots: sets of tied channels along each cell's channel axis, one
            cell after the other; where each cell starts; how many it has.
    """

    elements: Ids
    float_bits: Ids
    edges: tuple[str | None, ...]
    alive: NDArray[np.int64]
    steps: Ids
    overwritten: Ids
    written: Ids
    components: Ids
    starts: Ids
    n_slots: Ids

    def widths(self, activation_bits: dict[str, int]) -> Ids:
        """Bits per element of each cell."""
        bits = self.float_bits.copy()
        for cell, edge in enumerate(self.edges):
            if edge in activation_bits:
                bits[cell] = activation_bits[edge]
        return bits


@per_graph
def _plan(graph: Graph) -> _Plan:
    cell_of, heads = _cells(graph)
    first, last = _lifetimes(graph, cell_of, len(heads))
    alive = np.zeros((len(graph.nodes), len(heads)), np.int64)
    for cell in range(len(heads)):
        alive[first[cell] : last[cell] + 1, cell] = 1
    steps, overwritten, written = _in_place(graph, cell_of, heads, last)
    tails = {cell: index for index, cell in enumerate(cell_of) if cell is not None}
    vectors = [_components(graph, head) for head in heads]
    n_slots = np.array([v.size for v in vectors], np.int64)
    return _Plan(
        elements=np.array([math.prod(graph.nodes[h].shape) for h in heads], np.int64),
        float_bits=np.array([_bits_of(graph.nodes[h].dtype) for h in heads], np.int64),
        edges=tuple(edge_of(graph, tails[cell]) for cell in range(len(heads))),
        alive=alive,
        steps=steps,
        overwritten=overwritten,
        written=written,
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


def _cells(graph: Graph) -> tuple[list[int | None], list[int]]:
    """Cell of every node, and the node that each cell starts with."""
    cell_of: list[int | None] = []
    heads: list[int] = []
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], Ref) else None
        if not node.dtype:
            cell_of.append(None)
        elif source is not None and (node.op in _VIEWS or _is_fused(graph, node.op, source.index)):
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


def _lifetimes(
    graph: Graph, cell_of: list[int | None], n_cells: int
) -> tuple[list[int], list[int]]:
    first, last = [len(graph.nodes)] * n_cells, [0] * n_cells
    outputs = {ref.index for ref in graph.outputs}
    for index, cell in enumerate(cell_of):
        if cell is None:
            continue
        start = 0 if graph.nodes[index].op == "input" else index
        readers = [u for u in graph.consumers[index] if graph.nodes[u].dtype]
        end = len(graph.nodes) - 1 if index in outputs else max(readers, default=index)
        first[cell] = min(first[cell], start)
        last[cell] = max(last[cell], end)
    return first, last


def _in_place(
    graph: Graph, cell_of: list[int | None], heads: list[int], last: list[int]
) -> tuple[Ids, Ids, Ids]:
    found: list[tuple[int, int, int]] = []
    for cell, head in enumerate(heads):
        node = graph.nodes[head]
        for ref in refs_in(node.args) if node.op in _IN_PLACE else ():
            source = cell_of[ref.index]
            if source is not None and _can_take(graph, ref, head) and last[source] == head:
                found.append((head, source, cell))
                break
    steps, overwritten, written = np.array(found, np.int64).reshape(-1, 3).T
    return steps, overwritten, written


def _can_take(graph: Graph, ref: Ref, taker: int) -> bool:
    source, node = graph.nodes[ref.index], graph.nodes[taker]
    return source.op != "input" and (source.shape, source.dtype) == (node.shape, node.dtype)
