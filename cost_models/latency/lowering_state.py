"""What a lowering to calls knows of every value: its name, its type, its layout."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cost_models.latency.work import Call, Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate
from quant_ops.channels import analyse
from quant_ops.edges import activation_edges
from quant_ops.graph import Graph, Ref
from quant_ops.index_maps import varying_axes
from quant_ops.per_graph import per_graph
from quant_ops.removal import Removal
from quant_ops.slots import Ids

KernelFor = Callable[[str, int, int], str]


@dataclass(frozen=True, slots=True)
class CallValue:
    """What is known of a node's value: its name, the width of its codes, its layout."""

    name: str
    bits: int
    is_blocked: bool = False


@dataclass
class LoweringState:
    """Values and calls so far.

    Attributes:
        graph: folded network.
        candidate: without unused residuals.
        removal: what leaves the network.
        kernel_for: see `lowering.calls_of`.
        values: node to its value.
        copies: (value, kind of conversion) to the value that came out of it.
        calls: in the order of execution.
        fused: a node computed by an earlier call to the node of that.
    """

    graph: Graph
    candidate: Candidate
    removal: Removal
    kernel_for: KernelFor
    values: dict[int, CallValue] = field(default_factory=dict)
    copies: dict[tuple[str, str], str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    fused: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.assignment = self.candidate.assignment
        self.activation_bits = self.candidate.activation_bits
        self.quantized_at = {
            edge.node: self.activation_bits[edge.name]
            for edge in activation_edges(self.graph)
            if edge.name in self.activation_bits
        }

    def source(self, index: int, position: int = 0) -> int:
        """Node of an argument."""
        arg = self.graph.nodes[index].args[position]
        assert isinstance(arg, Ref)
        return arg.index

    def channels(self, index: int) -> int:
        """Entries along the channel axis of a value that remain."""
        shape = self.graph.nodes[index].shape
        full = shape[1] if len(shape) > 1 else 1
        sets = _channel_sets(self.graph)[index]
        if not self.removal or sets is None:
            return full
        return int((~self.removal.removed[sets]).sum())

    def elements(self, index: int) -> int:
        """Numbers of a value that remain."""
        shape, sets = self.graph.nodes[index].shape, _channel_sets(self.graph)[index]
        total = math.prod(shape)
        if not self.removal or sets is None:
            return total
        return total // sets.size * int((~self.removal.removed[sets]).sum())

    def add(self, work: Work, inputs: tuple[str, ...], output: str, index: int, bits: int) -> Call:
        """Append a call that is not of a layer; `bits` is the width of its input."""
        call = Call(work, self.kernel_for(work.operator, 0, bits), inputs, output, index)
        self.calls.append(call)
        return call

    def converted(self, index: int, *, bits: int, blocked: bool | None) -> CallValue:
        """A value as codes of a width or as floats, and in a layout; None: as it is."""
        value = self.values[index]
        if (value.bits < FLOAT_BITS) != (bits < FLOAT_BITS):
            kind = "dequantize" if value.bits < FLOAT_BITS else "quantize"
            value = self._once(index, kind, value, replace(value, bits=bits))
        if blocked is not None and value.is_blocked != blocked:
            value = self._once(index, "layout", value, replace(value, is_blocked=blocked))
        return value

    def _once(self, index: int, kind: str, old: CallValue, new: CallValue) -> CallValue:
        """Emit a conversion, unless an earlier reader of the value already needed it."""
        key = (old.name, kind)
        if kind == "layout":
            key = (f"{old.name} {old.bits}", kind)
            if key not in self.copies:
                work = Work("layout", (self.elements(index),))
                call = self.add(work, (old.name,), old.name, index, old.bits)
                self.calls[-1] = replace(call, is_implicit=True)
                self.copies[key] = old.name
            return new
        if key not in self.copies:
            self.copies[key] = f"{old.name}.{kind}d"
            work = Work(kind, (self.elements(index),))
            self.add(work, (old.name,), self.copies[key], index, min(old.bits, new.bits))
        return replace(new, name=self.copies[key])


@per_graph
def _channel_sets(graph: Graph) -> tuple[Ids | None, ...]:
    """For each node the sets of tied channels along its value's channel axis, if it has one."""
    return tuple(_sets(graph))


def _sets(graph: Graph) -> Iterator[Ids | None]:
    analysis = analyse(graph)
    for value in analysis.maps.values:
        ids = value[0] if isinstance(value, tuple) else value
        if not isinstance(ids, np.ndarray) or len(varying_axes(ids)) != 1:
            yield None
        else:
            yield analysis.component[ids.reshape(-1)]
