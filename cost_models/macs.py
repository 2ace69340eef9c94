"""Multiply-accumulates of the network that is left after removal."""

from typing import ClassVar

from cost_models.base import CostModel, Kind
from quant_ops.candidate import Candidate
from quant_ops.dual import without_unused
from quant_ops.graph import Graph
from quant_ops.removal import plan_removal


class MACs(CostModel):
    """Multiply-accumulates of all layers for one sample.

    Channels that leave the network do not count. Channels of width 0 that must stay (a tie is
    not 0 as a whole) do, since a dense kernel computes them.
    """

    name: ClassVar[str] = "macs"
    budget_key: ClassVar[str] = "macs"
    unit: ClassVar[str] = "op"
    kind: ClassVar[Kind] = "exact"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        graph, candidate = without_unused(graph, candidate)
        removal = plan_removal(graph, candidate)
        return float(
            sum(layer.macs // layer.n_weights * removal.n_weights(layer) for layer in graph.layers)
        )
