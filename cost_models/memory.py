"""Peak activation memory of the network in its execution order."""

from typing import ClassVar

from cost_models.arena import plan_arena
from cost_models.base import CostModel, Kind
from quant_ops.candidate import Candidate
from quant_ops.dual import without_unused
from quant_ops.graph import Graph


class PeakMemory(CostModel):
    """Length of the static arena that holds all values of one sample, as `plan_arena` lays it out.

    A value takes 4 bytes per element, or its activation width in bits, rounded up to whole bytes
    per tensor. Views share the memory of their source, an activation function is computed with
    the layer or addition before it, and an elementwise operator overwrites an operand of at least
    its own size that nobody reads later. Weights, copies that a strided layout may need, and the
    scratch memory of operators do not count.
    """

    name: ClassVar[str] = "ram_bytes"
    budget_key: ClassVar[str] = "ram"
    unit: ClassVar[str] = "B"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        graph, candidate = without_unused(graph, candidate)
        return float(plan_arena(graph, candidate).total_bytes)
