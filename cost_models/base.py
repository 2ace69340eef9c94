"""The contract of a cost model."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from quant_ops.candidate import Candidate
from quant_ops.graph import Graph

Kind = Literal["exact", "measured", "fitted", "analytic"]


class CostModel(ABC):
    """What one candidate costs; lower is better.

    Attributes:
        name: key in records and budgets, e.g. "size_bytes".
        budget_key: what `--budget KEY=LIMIT` calls it.
        unit: "B", "op", "ms", "LUT"; "" for a count.
        kind: how far the number can be trusted.
    """

    name: ClassVar[str]
    budget_key: ClassVar[str]
    unit: ClassVar[str]
    kind: ClassVar[Kind]

    @abstractmethod
    def cost(self, graph: Graph, candidate: Candidate) -> float:
        """The cost of the folded network `graph` under `candidate`, nothing written or run."""
