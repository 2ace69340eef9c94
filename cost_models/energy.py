"""Energy of one inference: arithmetic and memory traffic at published energies per operation."""

import math
from collections.abc import Sequence
from typing import ClassVar

from cost_models.base import CostModel, Kind
from cost_models.bops import weight_bit_macs
from cost_models.cells import cells_of
from cost_models.memory import PeakMemory
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate
from quant_ops.dual import without_unused
from quant_ops.edges import edge_of
from quant_ops.graph import Graph, Layer, Ref
from quant_ops.packed_size import size_bytes
from quant_ops.removal import Removal, plan_removal

# [Horowitz2014], 45 nm at 0.9 V, picojoules. An 8-bit multiplier takes 0.2 and a 32-bit one 3.1:
# 0.003 for each product of two bits. Adders take 0.1 for 32 bits, and 0.9 in float.
PJ_PER_BIT_PRODUCT = 0.003
PJ_PER_ACCUMULATION = 0.1
PJ_PER_FLOAT_MAC = 3.7 + 0.9
# Reading or writing 64 bits: cache of so many bytes, picojoules; DRAM takes 1.3 to 2.6 nJ.
MEMORIES = ((8 << 10, 10.0), (32 << 10, 20.0), (1 << 20, 100.0), (math.inf, 1950.0))


class Energy(CostModel):
    """Nanojoules of one sample: multiply-accumulates, weights read once, activations moved.

    Weights come from the smallest memory of [Horowitz2014] that holds the packed file, activations
    from the one that holds the arena: each value is written once and read once per reader. Float
    weights or activations make a multiply-accumulate a float32 one. Control, clocks and leakage
    are left out, as they are there; good for comparing candidates, not for sizing a battery.
    """

    name: ClassVar[str] = "energy_nj"
    budget_key: ClassVar[str] = "energy"
    unit: ClassVar[str] = "nJ"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        n_bytes = size_bytes(graph, candidate)
        graph, candidate = without_unused(graph, candidate)
        removal = plan_removal(graph, candidate)
        arithmetic = sum(_arithmetic(graph, x, candidate, removal) for x in graph.layers)
        moved = _moved_bits(graph, candidate)
        arena = PeakMemory().cost(graph, candidate)
        traffic = 8 * n_bytes * pj_per_bit(n_bytes) + moved * pj_per_bit(arena)
        return (arithmetic + traffic) / 1e3


def pj_per_bit(n_bytes: float) -> float:
    """Energy of one bit of the smallest memory that holds so many bytes.

    >>> pj_per_bit(1000), pj_per_bit(100_000)
    (0.15625, 1.5625)
    """
    return next(energy for size, energy in MEMORIES if n_bytes <= size) / 64


def _arithmetic(graph: Graph, layer: Layer, candidate: Candidate, removal: Removal) -> float:
    if not layer.macs:
        return 0.0
    quant = candidate.assignment.get(layer.name)
    macs = layer.macs // layer.n_weights * removal.n_weights(layer)
    bits = [_bits_read(graph, site, candidate) for site in layer.sites]
    if quant is None or FLOAT_BITS in bits:
        return PJ_PER_FLOAT_MAC * macs
    mean = _mean_by_work(graph, layer.sites, bits)
    products = mean * weight_bit_macs(layer, quant, removal)
    return PJ_PER_BIT_PRODUCT * products + PJ_PER_ACCUMULATION * macs


def _mean_by_work(graph: Graph, sites: Sequence[int], bits: Sequence[int]) -> float:
    work = [math.prod(graph.nodes[site].shape) for site in sites]
    return sum(w * b for w, b in zip(work, bits, strict=True)) / sum(work)


def _bits_read(graph: Graph, site: int, candidate: Candidate) -> int:
    source = graph.nodes[site].args[0]
    edge = edge_of(graph, source.index) if isinstance(source, Ref) else None
    return candidate.activation_bits.get(edge or "", FLOAT_BITS)


def _moved_bits(graph: Graph, candidate: Candidate) -> float:
    """Bits written and read of all values; views move nothing, removed channels are not there."""
    cells = cells_of(graph)
    elements = cells.kept_elements(graph, candidate)
    bits = cells.widths(candidate.activation_bits)
    readers = [0] * len(cells.heads)
    for node, users in enumerate(graph.consumers):
        cell = cells.of_node[node]
        if cell is not None:
            readers[cell] += sum(cells.of_node[user] not in (None, cell) for user in users)
    moved = ((e * b) * (1 + n) for e, b, n in zip(elements, bits, readers, strict=True))
    return float(sum(moved))
