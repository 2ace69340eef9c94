"""Integer program -> layers of hls4ml that compute its integers; says what has no exact form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from quant_ops.edges import SPLITTING
from quant_ops.graph import Graph
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
from search.exporters.hls.builder import SPATIAL, Builder, flat, image
from search.exporters.hls.fixed import holding
from search.exporters.hls.images import convolution, maxima, pointwise, pooling, window_sums
from search.exporters.hls.network import Block, Inexpressible, Network, Value, Wiring
from search.exporters.hls.rescaling import Stage
from search.exporters.plain_calls import SORTING, plain_args, plain_call
from search.exporters.pools import Extreme, windows_of_maximum
from search.exporters.ports import Port
from search.exporters.unrolled import RELU
from search.exporters.wires import POOL, is_plain_pool, pair


def translate(program: IntegerProgram, graph: Graph) -> Network:
    """All blocks of a program.

    Raises:
        Inexpressible: a step has no exact form.
    """
    for island in program.float_islands:
        reason = f"computes in float32 ({island.reason})"
        raise Inexpressible(island.name, reason, "quantize its activations")
    walk = _Walk(program, graph)
    for step in program.steps:
        walk.take(step)
    outputs = tuple(walk.output(number) for number in program.outputs)
    return Network(tuple(walk.builder.blocks), tuple(walk.inputs), outputs)


class _Walk:
    """Values of the graph as values of blocks, in execution order."""

    def __init__(self, program: IntegerProgram, graph: Graph) -> None:
        self._program, self._graph = program, graph
        self.builder = Builder()
        self.inputs: list[tuple[str, Wiring]] = []
        self._values: dict[int, Any] = {}
        self._sums: dict[int, Rescale] = {}  # outputs that leave before they are rescaled
        self._forms: dict[type[Step], Callable[[Any], Any]] = {
            Input: self._input,
            Convolution: self._convolution,
            MatMul: self._matmul,
            Combine: self._combine,
            Multiply: self._multiply,
            Concatenate: self._concatenate,
            Average: self._average,
            Move: self._move,
            Call: self._call,
        }

    def take(self, step: Step) -> None:
        """Append what a step needs."""
        form = self._forms.get(type(step))
        if form is None:
            reason = f"has no exact form ({type(step).__name__.lower()})"
            raise Inexpressible(step.name, reason, "export it to ONNX")
        self._values[step.out] = form(step)

    def output(self, number: int) -> tuple[str, Wiring]:
        """A block of its own for a network output, and what its integers mean."""
        value, codes = self._value(number, f"output {number}"), _known(self._program.codes[number])
        if not value.is_whole:
            value = self.builder.flattened(value, f"output {number}")
        rescale = self._sums.get(number)
        zero_point = codes.zero_point if rescale is None else 0
        last = self._shifted(value, zero_point, f"output{number}", "")
        return last.block, Wiring(Port(codes, value.places.shape, rescale), value.places)

    def _input(self, step: Input) -> Value | None:
        if step.codes is None:
            return None  # numbers that are no codes: what reads them is refused
        codes, sizes = step.codes, self._shape(step)
        shape, places = laid = image(sizes)
        name = f"input{step.out}"
        attributes = {"input_shape": list(shape)}
        precision = {"result": holding(codes.low, codes.high)}
        low, high = (np.full(shape[-1], limit, np.int64) for limit in (codes.low, codes.high))
        block = Block(name, "InputLayer", (), precision, attributes, step.name)
        value = self.builder.append(block, laid, low, high)
        self.inputs.append((name, Wiring(Port(codes, sizes), places)))
        if codes.zero_point:
            value = self._shifted(value, -codes.zero_point, f"centred{step.out}", step.name)
        return value

    def _matmul(self, step: MatMul) -> Value:
        source, weights = self._source(step), step.weights.T.astype(np.float64)
        shape = self._shape(step)
        n_in, n_out = weights.shape
        if source.places.size == n_in:
            source = self.builder.flattened(source, step.name)
            lying = np.zeros_like(weights)
            lying[source.places.reshape(-1)] = weights
            attributes = {"n_in": n_in, "n_out": n_out, "weight_data": lying}
            block = (f"sums{step.out}", "Dense", step.name)
            sums = self.builder.linear(source, block, lying, attributes, flat(shape))
        else:
            positions = source.places.size // n_in
            rows = (1, positions, n_in), flat(source.places.shape)[1]
            source = self.builder.laid(source, rows, step.name)
            sums = pointwise(self.builder, step, source, weights, flat(shape)[1])
        return self._rescaled(step, step.rescale, sums)

    def _average(self, step: Average) -> Value:
        spans = {axis - 1: span for axis, span in zip(step.axes, step.windows, strict=True)}
        sums = window_sums(self.builder, step, self._source(step), spans, dict.fromkeys(spans, 1))
        if not step.keep_axes:
            sums = replace(sums, places=sums.places.squeeze(tuple(spans)))
        return self._rescaled(step, step.rescale, sums)

    def _convolution(self, step: Convolution) -> Value:
        sums = convolution(self.builder, step, self._source(step), self._shape(step))
        return self._rescaled(step, step.rescale, sums)

    def _combine(self, step: Combine) -> Value:
        return self._codes(step, step.rescale, [self._value(s, step.name) for s in step.sources])

    def _multiply(self, step: Multiply) -> Value:
        sources = [self._value(s, step.name) for s in step.sources]
        sources = self.builder.alike(sources, self._shape(step), step.name)
        product = self.builder.product(sources, f"product{step.out}", step.name)
        return self._rescaled(step, step.rescale, product)

    def _concatenate(self, step: Concatenate) -> Value:
        parts = []
        for number, (source, rescale) in enumerate(zip(step.sources, step.rescales, strict=True)):
            value, name = self._value(source, step.name), f"codes{step.out}p{number}"
            parts.append(
                self.builder.rescaled(rescale, [value], value.places.shape, name, step.name)
            )
        return self.builder.joined(parts, step.axis - 1, f"joined{step.out}", step.name)

    def _move(self, step: Move) -> Any:
        if step.op == "getitem":
            part = self._values[step.sources[0]][step.args[1]]
            if part is None:
                reason = "needs the places of the largest values"
                raise Inexpressible(step.name, reason, "export it to torch")
            return part
        source = self._source(step)
        if step.op in RELU:
            return self._relu(step, source)
        extreme = windows_of_maximum(
            step.op, self._plain(step), source.places.shape, self._shape(step)
        )
        if extreme is not None:
            value = self._extreme(step, source, extreme)
            return (value, None) if step.op in SPLITTING else value
        if step.op in SORTING:
            raise Inexpressible(step.name, f"sorts values ({step.op})", "export it to torch")
        places = torch.from_numpy(source.places[None] + 1.0)
        moved = implementation(step.op)(places, *self._plain(step))
        if isinstance(moved, torch.Tensor):
            return self._lies(step, source, moved)
        return tuple(self._lies(step, source, part) for part in moved)

    def _lies(self, step: Move, source: Value, moved: torch.Tensor) -> Value:
        if not moved.ndim or len(moved) != 1:
            reason = f"moves values between samples ({step.op})"
            raise Inexpressible(step.name, reason, "keep the batch in front")
        return replace(source, places=moved[0].long().numpy() - 1)

    def _relu(self, step: Move, source: Value) -> Value:
        low, high = np.maximum(source.low, 0), np.maximum(source.high, 0)
        result = replace(holding(0, int(high.max())), saturates=True)
        stage = Stage(np.ones(1), np.zeros(1), result, (low, high))
        return self.builder.stage(source, stage, f"moved{step.out}", step.name)

    def _extreme(self, step: Move, source: Value, extreme: Extreme) -> Value:
        """The largest of each window; the smallest as the largest of the negatives."""
        if step.op == POOL and is_plain_pool(step) and source.places.ndim == SPATIAL + 1:
            kernel, strides = pair(step.args[1]), pair(step.args[2] if len(step.args) > 2 else ())
            source = self.builder.laid(source, image(source.places.shape), step.name)
            laid = image(self._shape(step))
            return pooling(self.builder, step, source, laid, kernel, strides or kernel)
        negative = extreme.kind == "min"
        if negative:
            source = self._negated(source, f"negative{step.out}", step.name)
        value = maxima(self.builder, step, source, extreme.windows, extreme.steps)
        if negative:
            value = self._negated(value, f"smallest{step.out}", step.name)
        if extreme.keeps:
            return value
        return replace(value, places=value.places.squeeze(tuple(extreme.windows)))

    def _call(self, step: Call) -> Any:
        return plain_call(step, self._values, self._graph)

    def _plain(self, step: Move) -> list[Any]:
        """Its arguments after the first; of a value whose shape alone is asked for, zeros."""
        known = {
            number: value
            for number, value in self._values.items()
            if value is not None and not isinstance(value, Value)
        }
        found = plain_args(step.op, step.args[1:], known, self._graph)
        if found is None:
            reason = f"moves by numbers that are computed ({step.op})"
            raise Inexpressible(step.name, reason, "export it to ONNX")
        return found

    def _shape(self, step: Step) -> tuple[int, ...]:
        """Of one sample of its result."""
        return tuple(self._graph.nodes[step.out].shape[1:])

    def _source(self, step: Step) -> Value:
        return self._value(step.sources[0], step.name)

    def _value(self, number: int, name: str) -> Value:
        value = self._values[number]
        if not isinstance(value, Value):
            reason = "reads numbers that are no codes"
            raise Inexpressible(name, reason, "search with --activation-bits 8")
        return value

    def _shifted(self, value: Value, by: int, name: str, origin: str) -> Value:
        reach = value.low + by, value.high + by
        result = holding(int(reach[0].min()), int(reach[1].max()))
        stage = Stage(np.ones(1), np.full(1, float(by)), result, reach)
        return self.builder.stage(value, stage, name, origin)

    def _negated(self, value: Value, name: str, origin: str) -> Value:
        reach = -value.high, -value.low
        result = holding(int(reach[0].min()), int(reach[1].max()))
        return self.builder.stage(
            value, Stage(-np.ones(1), np.zeros(1), result, reach), name, origin
        )

    def _rescaled(self, step: Step, rescale: Rescale, sums: Value) -> Value:
        """Codes; the sums themselves where they leave the network and would be 25-bit scores."""
        out = step.out
        if out in self._program.outputs and _known(self._program.codes[out]).high == WIDE_LIMIT:
            self._sums[out] = rescale
            return sums
        return self._codes(step, rescale, [sums])

    def _codes(self, step: Step, rescale: Rescale, sources: list[Value]) -> Value:
        name = f"codes{step.out}"
        return self.builder.rescaled(rescale, sources, self._shape(step), name, step.name)


def _known(codes: Codes | None) -> Codes:
    assert codes is not None
    return codes
