"""Runs networks that begin alike: what they have in common is computed once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.executor import Executor
from quant_ops.graph import Params, params_in
from quant_ops.quantized import ActivationQuant

Network: TypeAlias = tuple[Params, Mapping[int, ActivationQuant]]
Outputs: TypeAlias = tuple[Tensor, ...]
MEMORY_BYTES = 512 << 20


def beginning(candidate: Candidate, layers: Iterable[str]) -> tuple[str, ...]:
    """Sorts candidates such that those that begin alike are neighbours.

    Args:
        candidate: of a network.
        layers: names of its layers in execution order; one that is absent stays float.
    """
    assignment = candidate.assignment
    quants = (assignment.get(name) for name in layers)
    return (
        *(str(bits) for _, bits in sorted(candidate.activations)),
        *("" if quant is None else quant.to_text() for quant in quants),
    )


class PrefixRunner:
    """Runs networks of one graph, one after the other, each from where it departs from the last.

    Two networks compute the same values up to the first node that reads a parameter tensor that
    is not the same object, or whose activation quantizer differs.

    Args:
        executor: of the graph.
        memory_bytes: what kept values of one batch may fill.
    """

    def __init__(self, executor: Executor, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._executor = executor
        self._memory_bytes = memory_bytes
        self._first_use: dict[str, int] = {}
        for index, node in enumerate(executor.graph.nodes):
            for name in params_in(node.args):
                self._first_use.setdefault(name, index)

    def run(self, networks: Sequence[Network], inputs: Sequence[Tensor]) -> Iterator[Outputs]:
        """Outputs of each network in turn, equal to those of a run of its own.

        Args:
            networks: parameters and activation quantizers; neighbours should begin alike.
            inputs: one batch.
        """
        departures = [self.departure(a, b) for a, b in pairwise(networks)]
        points = self._kept_points(departures, int(inputs[0].shape[0]))
        wanted = sorted({node for point in points for node in self._executor.live_values(point)})
        values: dict[int, Tensor] = {}
        for position, (params, quantizers) in enumerate(networks):
            common = departures[position - 1] if position else 0
            values = {node: value for node, value in values.items() if node < common}
            start = self._start(points, common, values)
            transforms = {node: quant.fake_quantize for node, quant in quantizers.items()}
            outputs, kept = self._executor.run(
                params, inputs, transforms=transforms, keep=wanted, start=start, values=values
            )
            values |= kept
            yield outputs

    def departure(self, a: Network, b: Network) -> int:
        """The first node whose value may differ."""
        nodes = len(self._executor.graph.nodes)
        changed = [index for name, index in self._first_use.items() if a[0][name] is not b[0][name]]
        for node in a[1].keys() | b[1].keys():
            if a[1].get(node) != b[1].get(node):
                changed.append(node)
        return min(changed, default=nodes)

    def _kept_points(self, departures: Sequence[int], batch: int) -> list[int]:
        """Departures at which values are kept, the most frequent first as memory allows."""
        counts = {point: departures.count(point) for point in departures}
        chosen: list[int] = []
        held: set[int] = set()
        for point in sorted(counts, key=lambda p: (-counts[p], p)):
            new = set(self._executor.live_values(point)) - held
            if self._bytes(held | new) * batch <= self._memory_bytes:
                chosen.append(point)
                held |= new
        return sorted(chosen)

    def _bytes(self, nodes: set[int]) -> int:
        total = 0
        for index in nodes:
            elements = 4
            for size in self._executor.graph.nodes[index].shape:
                elements *= size
            total += elements
        return total

    def _start(self, points: Sequence[int], common: int, values: Mapping[int, Tensor]) -> int:
        for point in reversed(points):
            if point <= common and all(n in values for n in self._executor.live_values(point)):
                return point
        return 0
