"""The contract of a cost model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph
from quant_ops.quantized import QuantizedModel

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

    def cost_of(self, model: QuantizedModel) -> float:
        """The cost of a model that brings codes of its own."""
        return self.cost(model.graph, model.candidate)

    def bound(self, bank: WeightBank, settings: Mapping[str, str]) -> "CostModel":
        """The same cost for one network: codes come from `bank`, the device from `settings`.

        A model that needs neither is its own.
        """
        return self
