"""Integer program -> layers of hls4ml that compute its integers; says what has no exact form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant_ops.graph import Graph
from quant_ops.operators import implementation
from quant_ops.program import (
    Average,
    Call,
    Combine,
    Convolution,
    Input,
    IntegerProgram,
    MatMul,
    Move,
    Step,
)
from quant_ops.requantize import WIDE_LIMIT, Codes, Rescale
from search.exporters.hls.builder import Builder
from search.exporters.hls.fixed import holding
from search.exporters.hls.images import convolution, image, pooling
from search.exporters.hls.network import Block, Inexpressible, Network, Value, Wiring
from search.exporters.hls.rescaling import Stage
from search.exporters.plain_calls import plain, plain_call
from search.exporters.ports import Port
from search.exporters.unrolled import COMPARING, MAX_PRODUCTS, RELU
from search.exporters.wires import POOL, is_plain_pool


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
            Average: self._average,
            Move: self._move,
            Call: self._call,
        }

    def take(self, step: Step) -> None:
        """Append what a step needs."""
        form = self._forms.get(type(step))
        if form is None:
            raise Inexpressible(step.name, f"has no exact form ({type(step).__name__.lower()})")
        self._values[step.out] = form(step)

    def output(self, number: int) -> tuple[str, Wiring]:
        """A block of its own for a network output, and what its integers mean."""
        value, codes = self._values[number], _known(self._program.codes[number])
        if not np.array_equal(np.sort(value.places, axis=None), np.arange(np.prod(value.shape))):
            raise Inexpressible(f"output {number}", "leaves only a part of a value")
        rescale = self._sums.get(number)
        zero_point = codes.zero_point if rescale is None else 0
        last = self._shifted(value, zero_point, f"output{number}", "")
        return last.block, Wiring(Port(codes, value.places.shape, rescale), value.places)

    def _input(self, step: Input) -> Value:
        codes, node = _known(step.codes), self._graph.nodes[step.out]
        shape, places = laid = image(node.shape[1:])
        name = f"input{step.out}"
        attributes = {"input_shape": list(shape)}
        precision = {"result": holding(codes.low, codes.high)}
        low, high = (np.full(shape[-1], limit, np.int64) for limit in (codes.low, codes.high))
        block = Block(name, "InputLayer", (), precision, attributes, step.name)
        value = self.builder.append(block, laid, low, high)
        self.inputs.append((name, Wiring(Port(codes, node.shape[1:]), places)))
        if codes.zero_point:
            value = self._shifted(value, -codes.zero_point, f"centred{step.out}", step.name)
        return value

    def _matmul(self, step: MatMul) -> Value:
        source = self._source(step)
        if source.places.size != step.weights.shape[1]:
            raise Inexpressible(step.name, "is applied to several positions")
        shape = self._graph.nodes[step.out].shape[1:]
        sums = self._dense(step, source, step.weights.T.astype(np.float64), shape)
        return self._rescaled(step, step.rescale, sums)

    def _average(self, step: Average) -> Value:
        """Sums over windows are a dense layer of zeros and ones."""
        source = self._source(step)
        n = source.places.size
        if n**2 > MAX_PRODUCTS * 16:
            raise Inexpressible(step.name, f"averages {n:,} values, too many to lay out")
        ones = np.eye(n).reshape(n, *source.places.shape)
        for axis, (start, end) in zip(step.axes, step.windows, strict=True):
            moved = np.moveaxis(ones, axis, 0)
            sums = [moved[a:b].sum(axis=0) for a, b in zip(start, end, strict=True)]
            ones = np.moveaxis(np.stack(sums), 0, axis)
        if not step.keep_axes:
            ones = ones.squeeze(step.axes)
        value = self._dense(step, source, ones.reshape(n, -1), ones.shape[1:])
        return self._rescaled(step, step.rescale, value)

    def _dense(
        self, step: Step, source: Value, weights: NDArray[np.float64], shape: tuple[int, ...]
    ) -> Value:
        """Weights (elements of the source, outputs), both in the graph's order."""
        source = self._flat(source, f"flat{step.out}", step.name)
        laid = np.zeros((source.shape[0], weights.shape[1]))
        laid[source.places.reshape(-1)] = weights
        attributes = {"n_in": laid.shape[0], "n_out": laid.shape[1], "weight_data": laid}
        block = (f"sums{step.out}", "Dense", step.name)
        places = np.arange(laid.shape[1]).reshape(shape)
        return self.builder.linear(source, block, laid, attributes, ((places.size,), places))

    def _flat(self, source: Value, name: str, origin: str) -> Value:
        """hls4ml would make a convolution of a dense layer on an image."""
        if len(source.shape) == 1:
            return source
        n = int(np.prod(source.shape))
        low, high = np.resize(source.low, n), np.resize(source.high, n)
        precision = {"result": holding(int(low.min()), int(high.max()))}
        attributes = {"target_shape": [n]}
        block = Block(name, "Reshape", (source.block,), precision, attributes, origin)
        return self.builder.append(block, ((n,), source.places), low, high)

    def _convolution(self, step: Convolution) -> Value:
        source, shape = self._source(step), self._graph.nodes[step.out].shape[1:]
        return self._rescaled(step, step.rescale, convolution(self.builder, step, source, shape))

    def _combine(self, step: Combine) -> Value:
        sources: list[Value] = [self._values[number] for number in step.sources]
        if len(sources) > 2:
            raise Inexpressible(step.name, "adds more than two values")
        first, last = sources[0], sources[-1]
        if first.shape != last.shape or not np.array_equal(first.places, last.places):
            raise Inexpressible(step.name, "adds values that lie in different orders")
        return self.builder.rescaled(step.rescale, sources, f"codes{step.out}", step.name)

    def _move(self, step: Move) -> Any:
        source: Value = self._source(step)
        name = f"moved{step.out}"
        if step.op in RELU:
            low, high = np.maximum(source.low, 0), np.maximum(source.high, 0)
            result = replace(holding(0, int(high.max())), saturates=True)
            stage = Stage(np.ones(1), np.zeros(1), result, (low, high))
            return self.builder.stage(source, stage, name, step.name)
        if step.op == POOL and is_plain_pool(step):
            shape = self._graph.nodes[step.out].shape[1:]
            return pooling(self.builder, step, source, shape)
        if step.op.startswith(COMPARING) or step.op == POOL or step.op == "getitem":
            raise Inexpressible(step.name, f"has no exact form ({step.op})")
        places = torch.from_numpy(source.places[None] + 1.0)
        args = (plain(a, self._values) for a in step.args[1:])
        moved = implementation(step.op)(places, *args)
        if not isinstance(moved, torch.Tensor) or bool((moved == 0).any()):
            raise Inexpressible(step.name, f"splits or pads ({step.op})")
        return replace(source, places=moved[0].long().numpy() - 1)

    def _call(self, step: Call) -> Any:
        return plain_call(step, self._values, self._graph)

    def _source(self, step: Step) -> Value:
        value = self._values[step.sources[0]]
        assert isinstance(value, Value)
        return value

    def _shifted(self, value: Value, by: int, name: str, origin: str) -> Value:
        reach = value.low + by, value.high + by
        result = holding(int(reach[0].min()), int(reach[1].max()))
        stage = Stage(np.ones(1), np.full(1, float(by)), result, reach)
        return self.builder.stage(value, stage, name, origin)

    def _rescaled(self, step: Step, rescale: Rescale, sums: Value) -> Value:
        """Codes; the sums themselves where they leave the network and would be 25-bit scores."""
        out = step.out
        if out in self._program.outputs and _known(self._program.codes[out]).high == WIDE_LIMIT:
            self._sums[out] = rescale
            return sums
        return self.builder.rescaled(rescale, [sums], f"codes{out}", step.name)


def _known(codes: Codes | None) -> Codes:
    assert codes is not None
    return codes
