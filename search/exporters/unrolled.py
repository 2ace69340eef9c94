"""An integer program as one piece of logic: every sum laid out, nothing is shared over time.

The adder graphs are da4ml's [Sun2025]: distributed arithmetic with shared subexpressions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cost_models.fpga.symbols import clamped_floor, tree, within
from quant_ops.errors import EnvironmentFault
from quant_ops.graph import Graph
from quant_ops.narrow import channel_of, narrowed
from quant_ops.operators import implementation
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
    Multiply,
    Step,
)
from quant_ops.requantize import WIDE_LIMIT, Codes, Rescale
from search.exporters.base import Refusal
from search.exporters.plain_calls import plain, plain_call
from search.exporters.ports import Port
from search.exporters.wires import POOL, Wires, each, is_plain_pool, pooled

if TYPE_CHECKING:
    from da4ml.types import CombLogic

MAX_PRODUCTS = 400_000  # weights times positions: more would not fit any FPGA
RELU = ("relu.default", "relu_.default")
# These compare values, or take their places from a value.
COMPARING = ("amax", "amin", "max", "min", "topk", "adaptive_max", "gather.", "index.", "expand_as")
KNOWN = (Input, Convolution, MatMul, Combine, Multiply, Average, Concatenate, Move)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The logic, integers in and out in the order of the ports, each flattened in C order.

    Scores of 25 bits would cost more logic than the layer that gives them, so outputs leave as
    that layer's sums wherever nothing else reads them.
    """

    logic: "CombLogic"
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def refusals(program: IntegerProgram, graph: Graph) -> list[Refusal]:
    """What keeps a program from being laid out."""
    found = [
        Refusal(island.name, f"computes in float32 ({island.reason})", "quantize its activations")
        for island in program.float_islands
    ]
    products = 0
    for step in program.steps:
        known = isinstance(step, KNOWN) or (isinstance(step, Call) and not step.reason)
        if not known and not (isinstance(step, Call) and step.reason):
            reason = f"has no form in logic ({type(step).__name__.lower()})"
            found.append(Refusal(step.name, reason, "export it to C or ONNX"))
        if isinstance(step, Move) and step.op.startswith(COMPARING) and not is_plain_pool(step):
            reason = f"compares values in a way that is not laid out here ({step.op})"
            found.append(Refusal(step.name, reason, "pool whole windows, or export it to C"))
        if isinstance(step, Convolution) and max(step.input_stride) > 1:
            found.append(Refusal(step.name, "is a transposed convolution", "export it to C"))
        if isinstance(step, Convolution | MatMul):
            shape = graph.nodes[step.out].shape
            positions = int(np.prod(shape)) // len(step.weights)
            products += int(np.count_nonzero(step.weights)) * positions
    if products > MAX_PRODUCTS:
        reason = f"has {products:,} products to lay out side by side, at most {MAX_PRODUCTS:,} fit"
        found.append(Refusal("the network", reason, "search with --budget lut=..., or export to C"))
    return found


def unroll(program: IntegerProgram, graph: Graph) -> Unrolled:
    """Lay out a program that has no `refusals`.

    Raises:
        EnvironmentFault: da4ml is not installed.
    """
    try:
        from da4ml.trace import comb_trace
    except ImportError as error:
        raise EnvironmentFault(
            "da4ml lays out logic and is not installed; pip install 'bitfront[fpga]'"
        ) from error
    walk = _Walk(program, graph)
    for step in program.steps:
        walk.values[step.out] = walk.value_of(step)
    outputs = [walk.output(number) for number in program.outputs]
    logic = comb_trace(
        np.concatenate([wires.reshape(-1) for _, wires in walk.inputs]),
        np.concatenate([wires.reshape(-1) for _, wires in outputs]),
        keep_dead_inputs=True,
    )
    inputs, results = (tuple(port for port, _ in found) for found in (walk.inputs, outputs))
    return Unrolled(logic, inputs, results)


class _Walk:
    """Values as arrays of symbols, one for each code of a sample."""

    def __init__(self, program: IntegerProgram, graph: Graph) -> None:
        from da4ml.trace import FixedVariable, FixedVariableArray, HWConfig
        from da4ml.trace.fixed_variable_array import cmvm

        self._program, self._graph = program, graph
        self._variable, self._array, self._cmvm = FixedVariable, FixedVariableArray, cmvm
        self._hardware = HWConfig(1, -1, -1)
        self.values: dict[int, Any] = {}
        self.inputs: list[tuple[Port, Wires]] = []
        self._sums: dict[int, tuple[Rescale, tuple[Wires, ...]]] = {}  # outputs not rescaled
        self._laid: dict[type[Step], Callable[[Any], Any]] = {
            Input: self._input,
            Convolution: self._convolution,
            MatMul: self._matmul,
            Combine: self._combine,
            Multiply: self._multiply,
            Average: self._average,
            Concatenate: self._concatenate,
            Move: self._move,
            Call: self._call,
        }

    def value_of(self, step: Step) -> Any:
        """What the step writes."""
        return self._laid[type(step)](step)

    def output(self, number: int) -> tuple[Port, Wires]:
        """A network output and the wires that leave the logic for it."""
        codes = _known(self._program.codes[number])
        if number in self._sums:
            rescale, sums = self._sums[number]
            return Port(codes, sums[0].shape[1:], rescale), np.stack(sums)
        zero_point = codes.zero_point
        wires = each(lambda v: v + zero_point if zero_point else v, self.values[number])
        return Port(codes, wires.shape[1:]), wires

    def _input(self, step: Input) -> Wires:
        codes = _known(step.codes)
        shape = self._graph.nodes[step.out].shape
        low, high = (np.full(shape, float(limit)) for limit in (codes.low, codes.high))
        ports = self._array.from_lhs(low, high, np.ones(shape), self._hardware)._vars
        self.inputs.append((Port(codes, shape[1:]), ports))
        return each(lambda v: v - codes.zero_point if codes.zero_point else v, ports)

    def _convolution(self, step: Convolution) -> Wires:
        (x,) = self._sources(step)
        pads = [(max(a, 0), max(b, 0)) for a, b in step.padding]
        padded = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=self._constant(0))
        for axis, (before, after) in enumerate(step.padding, start=2):
            kept = slice(max(-before, 0), padded.shape[axis] - max(-after, 0))
            padded = padded[(slice(None),) * axis + (kept,)]
        shape = self._graph.nodes[step.out].shape
        out = np.empty((1, len(step.weights), *shape[2:]), object)
        per_group = len(step.weights) // step.groups
        channels = step.weights.shape[1]
        for group in range(step.groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            weights = step.weights[rows].reshape(per_group, -1).T
            for position in product(*(range(n) for n in shape[2:])):
                window = tuple(
                    slice(p * s, p * s + d * (k - 1) + 1, d)
                    for p, s, d, k in zip(
                        position, step.stride, step.dilation, step.weights.shape[2:], strict=True
                    )
                )
                source = padded[0, group * channels : (group + 1) * channels]
                taps = source[(slice(None), *window)]
                place: tuple[Any, ...] = (slice(None), *position)
                out[0, rows][place] = self._products(weights, taps.reshape(-1))
        return self._rescaled(step.rescale, step.out, out)

    def _matmul(self, step: MatMul) -> Wires:
        (x,) = self._sources(step)
        rows = [self._products(step.weights.T, row) for row in x.reshape(-1, x.shape[-1])]
        sums = np.stack(rows).reshape(*x.shape[:-1], -1)
        return self._rescaled(step.rescale, step.out, sums)

    def _combine(self, step: Combine) -> Wires:
        return self._rescaled(step.rescale, step.out, *self._sources(step))

    def _multiply(self, step: Multiply) -> Wires:
        left, right = np.broadcast_arrays(*self._sources(step))
        return self._rescaled(step.rescale, step.out, left * right)

    def _average(self, step: Average) -> Wires:
        (x,) = self._sources(step)
        for axis, (start, end) in zip(step.axes, step.windows, strict=True):
            moved = np.moveaxis(x, axis, 0)
            sums = [tree(np.add, moved[a:b]) for a, b in zip(start, end, strict=True)]
            x = np.moveaxis(np.stack(sums), 0, axis)
        if not step.keep_axes:
            x = x.squeeze(step.axes)
        return self._rescaled(step.rescale, step.out, x)

    def _concatenate(self, step: Concatenate) -> Wires:
        parts = zip(step.rescales, self._sources(step), strict=True)
        return np.concatenate([self._requantized(r, x) for r, x in parts], step.axis)

    def _move(self, step: Move) -> Any:
        source = self.values[step.sources[0]]
        if step.op == "getitem":
            return source[step.args[1]]
        if step.op in RELU:
            return each(lambda v: v.max_of(0), source)
        if step.op == POOL:
            return pooled(step, source)
        places = torch.arange(1, source.size + 1, dtype=torch.float64).reshape(source.shape)
        moved = implementation(step.op)(places, *(plain(a, self.values) for a in step.args[1:]))
        wires = np.append(source.reshape(-1), self._constant(0))
        if isinstance(moved, torch.Tensor):
            return wires[moved.long().numpy() - 1]
        return tuple(wires[part.long().numpy() - 1] for part in moved)

    def _call(self, step: Call) -> Any:
        return plain_call(step, self.values, self._graph)

    def _sources(self, step: Step) -> list[Wires]:
        return [self.values[number] for number in step.sources]

    def _constant(self, value: int) -> Any:
        return self._variable.from_const(value, self._hardware)

    def _products(self, weights: NDArray[np.int16], taps: Wires) -> Wires:
        """(out,) sums of weights (n, out) times taps (n,); what is always 0 is left out."""
        used = np.array([t.low != 0 or t.high != 0 for t in taps]) & weights.any(axis=1)
        if not used.any():
            return np.full(weights.shape[1], self._constant(0), object)
        kept = self._array(taps[used], hwconf=self._hardware)
        sums = self._cmvm(weights[used].astype(np.float64), kept, {})
        ends = np.array([[float(t.low), float(t.high)] for t in taps[used]]).T
        plus, minus = np.maximum(weights[used], 0).T, np.maximum(-weights[used], 0).T
        lows, highs = plus @ ends[0] - minus @ ends[1], plus @ ends[1] - minus @ ends[0]
        return np.array([within(*v) for v in zip(sums, lows, highs, strict=True)], object)

    def _rescaled(self, rescale: Rescale, out: int, *sums: Wires) -> Wires:
        """Codes minus the zero point; the sums themselves where only the caller reads them."""
        if out in self._program.outputs and _known(self._program.codes[out]).high == WIDE_LIMIT:
            spread = np.broadcast_arrays(*sums)
            self._sums[out] = rescale, tuple(spread)
            return spread[0]
        return self._requantized(rescale, *sums)

    def _requantized(self, rescale: Rescale, *sums: Wires) -> Wires:
        """A channel's constants lie along the axis that they have."""
        spread = np.broadcast_arrays(*sums)
        shape = np.broadcast_shapes(spread[0].shape, rescale.offset.shape)
        channels = np.arange(rescale.offset.size).reshape(rescale.offset.shape)
        places = np.broadcast_to(channels, shape)
        terms = [np.broadcast_to(s, shape) for s in spread]
        result = np.empty(shape, object)
        for channel in range(rescale.offset.size):
            mine = places == channel
            wires = [term[mine] for term in terms]
            reaches = [(int(min(v.low for v in w)), int(max(v.high for v in w))) for w in wires]
            narrow = narrowed(channel_of(rescale, channel), *reaches)
            laid = np.empty(int(mine.sum()), object)
            laid[:] = [clamped_floor(narrow, found) for found in zip(*wires, strict=True)]
            result[mine] = laid
        return result


def _known(codes: Codes | None) -> Codes:
    assert codes is not None
    return codes
