"""Bit operations of the network that is left after removal."""

import math
from typing import ClassVar

from cost_models.base import CostModel, Kind
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused
from quant_ops.edges import edge_of
from quant_ops.graph import Graph, Layer, Ref
from quant_ops.removal import Removal, plan_removal


class BOPs(CostModel):
    """Multiply-accumulates times weight bits times bits of the layer's input, for one sample.

    Widths are summed over output channels, so a channel of width 0 is free. A float weight or
    activation has 32 bits; a ternary weight has 2, the width of a multiplier that takes it.
    [Baskin2021, without the accumulator term].
    """

    name: ClassVar[str] = "bops"
    budget_key: ClassVar[str] = "bops"
    unit: ClassVar[str] = "op"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        graph, candidate = without_unused(graph, candidate)
        removal = plan_removal(graph, candidate)
        assignment, activation_bits = candidate.assignment, candidate.activation_bits
        total = 0.0
        for layer in graph.layers:
            if not layer.macs:
                continue
            bits: float = FLOAT_BITS
            if activation_bits:
                bits = _input_bits(graph, layer, activation_bits)
            total += bits * weight_bit_macs(layer, assignment.get(layer.name), removal)
        return total


def _input_bits(graph: Graph, layer: Layer, activation_bits: dict[str, int]) -> float:
    """Bits of the layer's input, the mean over its calls weighted by their work."""
    total = work = 0
    for site in layer.sites:
        source = graph.nodes[site].args[0]
        size = math.prod(graph.nodes[site].shape)
        if isinstance(source, Ref):
            edge = edge_of(graph, source.index)
            total += size * activation_bits.get(edge or "", FLOAT_BITS)
            work += size
    return total / work if work else FLOAT_BITS


def weight_bit_macs(layer: Layer, quant: LayerQuant | None, removal: Removal) -> int:
    """MACs times weight bits of one layer, summed over its remaining output channels."""
    n_rows = removal.n_rows(layer)
    if not n_rows:
        return 0
    macs_per_row = layer.macs // layer.n_weights * removal.n_weights(layer) // n_rows
    if quant is None:
        return macs_per_row * n_rows * FLOAT_BITS
    if quant.uniform is not None:
        return macs_per_row * n_rows * math.ceil(quant.uniform)
    return macs_per_row * sum(map(math.ceil, quant.bit_widths))
