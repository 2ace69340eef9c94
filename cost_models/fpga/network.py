"""From a candidate's integer program to circuits, each layer looked at once per set of widths."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.assembly import NOTHING, assembled
from cost_models.fpga.circuit import Circuit, Features, accumulator_ranges
from cost_models.fpga.elementwise import moved, rescaled_sum
from cost_models.fpga.rescaling import MAX_CODES, Fixed, cheapest
from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import live_inputs
from quant_ops.dual import pairs
from quant_ops.edges import edge_of
from quant_ops.errors import UsageError
from quant_ops.graph import Graph, Layer, Ref, Shape, refs_in
from quant_ops.lowering import lower
from quant_ops.per_graph import per_graph
from quant_ops.program import (
    Average,
    Call,
    Combine,
    Concatenate,
    Convolution,
    Input,
    IntegerProgram,
    MatMul,
    Move,
    Step,
)
from quant_ops.quantized import QuantizedModel
from quant_ops.requantize import Codes, Rescale

MAX_WEIGHTS = 20_000  # of a layer that is unrolled: beyond, looking for shared sums takes minutes
Mask = NDArray[np.bool_]
Ends = tuple[bytes, bytes]  # inputs that a layer does not read, outputs that are constant
Key = tuple[str, LayerQuant | None, bytes | None, tuple[int, ...], int]


@dataclass(frozen=True, eq=False)
class Part:
    """One step of the network, unrolled.

    Attributes:
        name: of the step's node.
        circuit: what computes one position (of one group), None for comparisons and choices.
        kept: the circuit without constant inputs and without outputs that the next layer ignores.
        copies: how many positions there are.
        other: features of what has no circuit.
        taps, pixels: inputs of the circuit per channel, and elements of a channel of the source,
            which positions have in common; no pixels where every position has inputs of its own.
    """

    name: str
    circuit: Circuit | None
    kept: Circuit | None
    copies: int
    other: Features = NOTHING
    taps: int = 1
    pixels: int = 0

    @property
    def features(self) -> Features:
        """Of all copies; an input that several of them read is held once."""
        if self.kept is None:
            return self.other
        every = self.kept.features.times(self.copies)
        if not self.pixels:
            return every
        held = self.kept.input_registers.reshape(-1, self.taps).max(axis=1, initial=0).sum()
        return replace(every, input_bits=float(held * self.kept.input_width * self.pixels))


class Unrolled:
    """Features of the circuits of one network's candidates.

    Args:
        bank: of the network; every layer that a circuit is made of must be in the candidate, and
            so must be its activations.
    """

    def __init__(self, bank: WeightBank) -> None:
        self._bank = bank
        self._graph = bank.graph
        self._ends: dict[Key, Ends] = {}
        self._known: dict[tuple[Key, bytes, bytes], Features] = {}
        self._last: tuple[Candidate, Features] | None = None

    def features(self, candidate: Candidate) -> Features:
        """The sum over all steps, looked up where the widths around a layer were met before.

        Raises:
            UsageError: something of the network has no circuit; says what and what to do.
        """
        if self._last is None or self._last[0] != candidate:
            self._last = candidate, self._assembled(candidate)
        return self._last[1]

    def _assembled(self, candidate: Candidate) -> Features:
        keys = self.keys(candidate)
        if any(key not in self._ends for key in keys):
            self._learn(candidate, keys)
        full = self._with_neighbours(keys)
        if any(key not in self._known for key in full):
            self._learn(candidate, keys)
        return assembled(self._graph, {key[0][0]: self._known[key] for key in full})

    def _learn(self, candidate: Candidate, keys: list[Key]) -> None:
        """Build the circuits of a candidate, and keep what others can look up."""
        ends: dict[str, Ends] = {}
        parts = parts_of_model(self._bank.quantize(candidate))
        found = by_step(parts)
        for part in parts:
            if part.circuit is not None:
                unread = ~part.circuit.weights.any(axis=0)
                ends[part.name] = unread.tobytes(), part.circuit.constant.tobytes()
        for key in keys:
            self._ends[key] = ends.get(key[0], (b"", b""))
        for full in self._with_neighbours(keys):
            self._known[full] = found.get(full[0][0], NOTHING)

    def _with_neighbours(self, keys: list[Key]) -> list[tuple[Key, bytes, bytes]]:
        """Keys with what is constant before a layer and what is not read behind it."""
        links = _links(self._graph)
        if not links:
            return [(key, b"", b"") for key in keys]
        by_site = {key[0]: key for key in keys}
        constant = {links[s]: self._ends[by_site[s]][1] for s in links}
        unread = {s: self._ends[by_site[links[s]]][0] for s in links}
        return [(key, constant.get(key[0], b""), unread.get(key[0], b"")) for key in keys]

    def keys(self, candidate: Candidate) -> list[Key]:
        """Per step what its features depend on: widths of weights, inputs, result; dead inputs."""
        graph, assignment, edges = self._graph, candidate.assignment, candidate.activation_bits
        prunes = any(0 in quant.bit_widths for quant in assignment.values())
        live = live_inputs(graph, candidate) if prunes else {}
        out = []
        for site, sources, layer, edge in _sites(graph):
            quant = None if layer is None else assignment.get(layer)
            mask = None if layer is None or layer not in live else live[layer].tobytes()
            widths = tuple(edges.get(source, 0) for source in sources)
            out.append((site, quant, mask, widths, edges.get(edge, 0)))
        return out


@per_graph
def _sites(graph: Graph) -> list[tuple[str, tuple[str, ...], str | None, str]]:
    """(node, edges of its sources, layer, own edge) of every node that computes."""
    out = []
    for index, node in enumerate(graph.nodes):
        sources = [ref.index for ref in refs_in(node.args)]
        if sources and node.dtype:
            layer = graph.layer_at.get(index)
            name = None if layer is None else layer.name
            edges = tuple(edge_of(graph, source) or "" for source in sources)
            out.append((node.name, edges, name, edge_of(graph, index) or ""))
    return out


def by_step(parts: Iterable[Part]) -> dict[str, Features]:
    """Node name to the features of all its parts, which stand side by side."""
    found: dict[str, Features] = {}
    for part in parts:
        found[part.name] = found.get(part.name, NOTHING).beside(part.features)
    return found


def parts_of_model(model: QuantizedModel) -> list[Part]:
    """Every step of a model's integer program that takes resources, in execution order.

    Raises:
        UsageError: floats, a layer too large to be unrolled, or an operator without a circuit; says
            what and what to do.
    """
    program, graph = _lowered(model), model.graph
    prunes = any(0 in quant.bit_widths for _, quant in model.candidate.layers)
    live = live_inputs(graph, model.candidate) if prunes else {}
    parts = [part for step in program.steps for part in _parts(step, program, graph, live)]
    return _kept(parts, _links(graph))


def _kept(parts: list[Part], links: Mapping[str, str]) -> list[Part]:
    """The parts as a synthesizer keeps them, layers that follow each other looked at in pairs.

    No logic is left of outputs that are constant or that the next layer does not read.
    """
    whole = {part.name: part.circuit for part in parts}
    before = {second: first for first, second in links.items()}
    out = []
    for part in parts:
        own = part.circuit
        if own is None:
            out.append(part)
            continue
        previous = whole.get(before.get(part.name, ""))
        following = whole.get(links.get(part.name, ""))
        dead_inputs = np.zeros(own.weights.shape[1], np.bool_)
        dead_outputs = own.constant
        if previous is not None:
            dead_inputs = previous.constant
        if following is not None:
            dead_outputs = dead_outputs | ~following.weights.any(axis=0)
        out.append(replace(part, kept=own.without(dead_inputs, dead_outputs)))
    return out


@per_graph
def _links(graph: Graph) -> dict[str, str]:
    """Linear layer to the linear layer that alone reads its outputs, one by one."""
    out = {}
    for index, layer in graph.layer_at.items():
        at = index
        while len(graph.consumers[at]) == 1 and Ref(at) not in graph.outputs:
            at = graph.consumers[at][0]
            if at in graph.layer_at or graph.nodes[at].op != "relu.default":
                break
        reader = graph.layer_at.get(at)
        if at != index and reader is not None and layer.kind == reader.kind == "linear":
            out[graph.nodes[index].name] = graph.nodes[at].name
    return out


def _lowered(model: QuantizedModel) -> IntegerProgram:
    if not model.candidate.activations:
        raise UsageError(
            "an FPGA circuit computes with integers, and the activations of this run stay float; "
            "add --activation-bits 8 (or fewer)"
        )
    if pairs(model.graph):
        raise UsageError("layers that are the sum of two have no FPGA cost; leave --dual out")
    for layer in model.graph.layers:
        if layer.n_weights > MAX_WEIGHTS:
            raise UsageError(
                f"layer {layer.name!r} has {layer.n_weights:,} weights; circuits are unrolled, one "
                f"adder per digit, up to {MAX_WEIGHTS:,} weights a layer: use a smaller network"
            )
    program = lower(model)
    for island in program.float_islands:
        raise UsageError(
            f"operator {island.op} ({island.name}) has no circuit: {island.reason}; FPGA budgets "
            f"are for networks whose every operator has an integer form"
        )
    return program


def _parts(
    step: Step, program: IntegerProgram, graph: Graph, live: Mapping[str, Mask]
) -> Iterator[Part]:
    if isinstance(step, Input | Call):  # calls that are left are sizes and constants
        return
    source = program.codes[step.sources[0]]
    assert source is not None
    shape = graph.nodes[step.out].shape
    if isinstance(step, MatMul | Convolution):
        layer = graph.layer_at[graph.index_of[step.name]]
        for weights, rescale, copies in _matrices(step, layer, shape, live.get(layer.name)):
            circuit = _circuit(weights, source, rescale)
            part = Part(step.name, circuit, circuit, copies)
            if isinstance(step, Convolution):
                pixels = math.prod(graph.nodes[step.sources[0]].shape[2:])
                part = replace(part, taps=math.prod(step.weights.shape[2:]), pixels=pixels)
            yield part
    elif isinstance(step, Average):
        window = math.prod(int((end - start).max()) for start, end in step.windows)
        weights = np.ones((1, window), np.int64)
        circuit = _circuit(weights, source, _cut(step.rescale, slice(0, 1)))
        copies = math.prod(shape)
        yield Part(step.name, circuit, circuit, copies)
    elif isinstance(step, Combine | Concatenate | Move):
        other = _weightless(step, program, graph, shape)
        if other is not None:
            yield Part(step.name, None, None, 1, other)
    else:
        raise UsageError(
            f"operator {graph.nodes[step.out].op} ({step.name}) has no FPGA cost yet; FPGA budgets "
            f"are for networks of linear layers, convolutions, additions, pooling and ReLU"
        )


def _matrices(
    step: MatMul | Convolution, layer: Layer, shape: tuple[int, ...], mask: Mask | None
) -> Iterator[tuple[NDArray[np.int64], Rescale, int]]:
    """(weights of one position, rescaling of its rows, positions) of each group of channels."""
    weights = step.weights.astype(np.int64)
    if isinstance(step, MatMul):
        if mask is not None:
            weights = weights * mask
        yield weights, step.rescale, math.prod(shape[1:-1])
        return
    columns, rows = weights.shape[1], layer.out_channels // step.groups
    for group in range(step.groups):
        own = weights[group * rows : (group + 1) * rows]
        if mask is not None:
            part = mask[group * columns : (group + 1) * columns]
            own = own * part.reshape(1, -1, *[1] * (own.ndim - 2))
        channels = slice(group * rows, (group + 1) * rows)
        yield own.reshape(rows, -1), _cut(step.rescale, channels), math.prod(shape[2:])


def _cut(rescale: Rescale, channels: slice) -> Rescale:
    return Rescale(
        tuple(m.reshape(-1)[channels] for m in rescale.multipliers),
        rescale.offset.reshape(-1)[channels],
        rescale.shift.reshape(-1)[channels],
        rescale.zero_point,
        rescale.low,
        rescale.high,
    )


def _circuit(weights: NDArray[np.int64], source: Codes, rescale: Rescale) -> Circuit:
    """Weights on codes; what the zero point of the codes adds moves into the offset.

    A network's output is not narrowed: its accumulators leave the circuit.
    """
    if rescale.high - rescale.low > MAX_CODES:
        return Circuit(weights, source.low, source.high)
    shifted = -source.zero_point * weights.sum(axis=1)
    lows, highs = accumulator_ranges(weights, source.low, source.high)
    rows = []
    for at in range(len(weights)):
        multiplier = int(rescale.multipliers[0].reshape(-1)[at])
        shift = int(rescale.shift.reshape(-1)[at])
        offset = int(rescale.offset.reshape(-1)[at]) + multiplier * int(shifted[at])
        offset += rescale.zero_point << shift
        exact = Fixed(multiplier, offset, shift, rescale.low, rescale.high)
        rows.append(cheapest(exact, int(lows[at]), int(highs[at])))
    return Circuit(weights, source.low, source.high, tuple(rows))


def _weightless(
    step: Combine | Concatenate | Move, program: IntegerProgram, graph: Graph, shape: Shape
) -> Features | None:
    """Features of a step on codes alone, None where it is wires or its sums leave the network."""
    sources = [program.codes[number] for number in step.sources]
    codes = [source for source in sources if source is not None]
    if isinstance(step, Move):
        return moved(step, codes[0], graph.nodes[step.sources[0]].shape, shape)
    if isinstance(step, Combine):
        if step.rescale.high - step.rescale.low > MAX_CODES:
            return None
        return rescaled_sum(step.rescale, codes, math.prod(shape))
    found = NOTHING
    for number, rescale, code in zip(step.sources, step.rescales, codes, strict=True):
        n_elements = math.prod(graph.nodes[number].shape)
        found = found.beside(rescaled_sum(rescale, [code], n_elements))
    return found
