"""Bytes of the packed file: the number that a size budget is compared with."""

from typing import ClassVar

from cost_models.base import CostModel, Kind
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.graph import Graph
from quant_ops.packed_size import header, layer_term, payload_bytes, size_bytes


class PackedSize(CostModel):
    """Length of the packed file, to the byte, nothing written."""

    name: ClassVar[str] = "size_bytes"
    budget_key: ClassVar[str] = "size"
    unit: ClassVar[str] = "B"
    kind: ClassVar[Kind] = "exact"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        """Bytes, every scale, bias, mask and header included."""
        return size_bytes(graph, candidate)


def linear_terms(graph: Graph, layer_name: str, bit_width: LayerQuant | float) -> int:
    """Bytes that one searchable layer contributes at one uniform width (32: left float).

    For every candidate without removed channels and without quantized activations

        size_bytes <= constant(graph) + sum of linear_terms over the searchable layers,

    and the difference is at most `SLACK_BYTES`: the digits of the file's length in its header.
    Where channels are removed the sum is an upper bound that may be far above.
    """
    return layer_term(graph, graph.layer_of[layer_name], bit_width)


SLACK_BYTES = 40


def constant(graph: Graph) -> int:
    """Bytes of everything but the searchable layers, the file header at its longest."""
    in_float = payload_bytes(graph, Candidate(()))
    layers = graph.searchable_layers
    searched = sum(layer_term(graph, layer, FLOAT_BITS) for layer in layers)
    return len(header(10 * in_float + 999)) + in_float - searched
