"""The cost model over a latency table."""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar

from cost_models.base import CostModel, Kind
from cost_models.latency.lowering import calls_of
from cost_models.latency.table import LatencyTable
from cost_models.latency.work import Call, Work
from quant_ops.candidate import Candidate
from quant_ops.dual import without_unused
from quant_ops.errors import UsageError
from quant_ops.graph import Graph
from quant_ops.per_graph import per_graph
from quant_ops.removal import Removal, plan_removal

RESIDENT_STEP = 1.25  # networks whose weights differ by less count as equally large


class Latency(CostModel):
    """Milliseconds for one run of the network that is left after removal, by a table.

    The overhead of a run, plus the time of every fused call: convolution with activation and
    addition, linear layer, pool, copy, and every change between floats and codes or of layout.
    A width for which the device has no kernel costs what the wider kernel costs that runs it.
    Where the table's unit is relative the number is a ratio to other numbers of that table only.
    """

    name: ClassVar[str] = "latency_ms"
    budget_key: ClassVar[str] = "latency"
    unit: ClassVar[str] = "ms"
    kind: ClassVar[Kind] = "fitted"

    def __init__(self, table: LatencyTable | None = None, *, extrapolate: bool = False) -> None:
        self._table = table
        self._extrapolate = extrapolate
        self._times: dict[tuple[Work, str, str, int], float] = {}
        self._totals = per_graph(_no_totals)

    def __getstate__(self) -> dict[str, object]:
        """What a worker needs: the caches belong to graph objects of this process."""
        return {"table": self._table, "extrapolate": self._extrapolate}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def table(self) -> LatencyTable:
        """The table in use.

        Raises:
            UsageError: there is none.
        """
        if self._table is None:
            raise UsageError(
                "latency needs a table of the device: give --latency-table FILE or a name that "
                "`search tables` lists, or measure one with search profile"
            )
        return self._table

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        table = self.table
        totals = self._totals(graph)
        smaller, candidate = without_unused(graph, candidate)
        removal = plan_removal(smaller, candidate)
        key = self._key(candidate, removal)
        if key not in totals:
            calls = calls_of(smaller, candidate, removal, table.kernel_for)
            totals[key] = self.total(calls) * table.milliseconds
        return totals[key]

    def total(self, calls: list[Call]) -> float:
        """Time of a network's calls and of one run, in the table's unit."""
        table = self.table
        resident = sum(table.weight_bytes(call.work, call.kernel) for call in calls)
        step = round(_steps(resident))
        times = (self._time(call, step) for call in calls)
        return table.call_overhead + sum(times)

    def _time(self, call: Call, step: int) -> float:
        key = (call.work, call.kernel, call.layer, step)
        if key not in self._times:
            self._times[key] = self.table.time(
                call.work,
                call.kernel,
                call.layer,
                resident_bytes=RESIDENT_STEP**step,
                extrapolate=self._extrapolate,
            )
        return self._times[key]

    def _key(self, candidate: Candidate, removal: Removal) -> tuple[object, ...]:
        """Equal for candidates that run the same kernels on the same shapes."""
        weights, inputs = self._kernels_of_width
        layers = tuple((name, weights[max(quant.bit_widths)]) for name, quant in candidate.layers)
        edges = tuple((name, inputs[bits]) for name, bits in candidate.activations)
        removed = removal.removed.tobytes() if removal else b""
        return layers, edges, removed

    @cached_property
    def _kernels_of_width(self) -> "tuple[_KernelClasses, _KernelClasses]":
        """Of weights, of activations."""
        rules = self.table.rules
        weights, inputs = {r.weight_bits for r in rules}, {r.activation_bits for r in rules}
        return _KernelClasses(weights), _KernelClasses(inputs)


class _KernelClasses(dict[float, int]):
    """A width to the widest one that every rule treats alike."""

    def __init__(self, limits: Iterable[int]) -> None:
        super().__init__()
        self._steps = sorted(limit for limit in limits if limit)

    def __missing__(self, width: float) -> int:
        self[width] = next((step for step in self._steps if width <= step), 32)
        return self[width]


def _no_totals(graph: Graph) -> dict[tuple[object, ...], float]:
    return {}


def _steps(resident_bytes: float) -> float:
    return math.log(max(resident_bytes, 1.0), RESIDENT_STEP)
