"""Integer program -> operations of a generated library; says what it cannot express."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant_ops.edges import SPLITTING
from quant_ops.errors import UsageError
from quant_ops.graph import Ref
from quant_ops.operators import implementation
from quant_ops.program import (
    Average,
    Call,
    Combine,
    Concatenate,
    Convolution,
    Input,
    MatMul,
    Move,
    Multiply,
    Step,
    StepArg,
    refs_in_args,
)
from quant_ops.requantize import Codes, Rescale
from search.exporters.base import Refusal
from search.exporters.c.buffers import Buffers
from search.exporters.c.moves import HOLE
from search.exporters.c.network import (
    Conv,
    Network,
    Part,
    Pool,
    Product,
    Relu,
    Sizes,
    Sum,
    Value,
)
from search.exporters.c.reduced import ReducedProgram
from search.exporters.c.weights import pack_rows
from search.exporters.plain_calls import SORTING, plain_args, plain_call
from search.exporters.pools import windows_of_maximum


def translate(reduced: ReducedProgram) -> Network:
    """The network as operations on buffers.

    Raises:
        Inexpressible: an operator has no integer form here; names it, why, and what to do.
    """
    return _Translation(reduced).network()


class Inexpressible(UsageError):
    """The target cannot do this."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"the C target cannot express {refusal}")
        self.refusal = refusal


def refusal(name: str, reason: str, nearest: str) -> Inexpressible:
    """The sentence that says what the target cannot do."""
    return Inexpressible(Refusal(name, reason, nearest))


class _Translation:
    def __init__(self, reduced: ReducedProgram) -> None:
        self.program = reduced.program
        self.layers = reduced.layers
        self.graph, self.nodes = reduced.graph, reduced.graph.nodes
        self.values: dict[int, Value] = {}
        self.static: dict[int, Any] = {}
        ranks = {len(s.stride) for s in self.program.steps if isinstance(s, Convolution)}
        self.buffers = Buffers(frozenset({rank + 1 for rank in ranks} | {3, 4}))
        self.handlers: dict[type[Step], Callable[[Any], None]] = {
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

    def network(self) -> Network:
        for step in self.program.steps:
            handler = self.handlers.get(type(step))
            if handler is None:
                raise refusal(step.name, "it looks up rows by index", "use --to packed or onnx")
            handler(step)
        outputs = tuple(self._output(number) for number in self.program.outputs)
        inputs = tuple(self.values[s.out] for s in self.program.steps if isinstance(s, Input))
        return Network(inputs, outputs, tuple(self.buffers.sizes), self.buffers.needed(outputs))

    # values

    def _codes(self, number: int) -> Codes:
        codes = self.program.codes[number]
        assert codes is not None
        return codes

    def _sizes(self, number: int) -> tuple[int, ...]:
        shape = self.nodes[number].shape
        if not shape or shape[0] != 1:
            name = self.nodes[number].name
            raise refusal(name, "its first axis is not the batch", "keep the batch in front")
        return tuple(shape[1:])

    def _source(self, step: Step, at: int = 0) -> Value:
        return self.values[step.sources[at]]

    def _output(self, number: int) -> Value:
        if number not in self.values:
            name = self.nodes[number].name
            raise refusal(f"output {name}", "it is not quantized", "quantize activations to 8 bits")
        value = self.values[number]
        return self.buffers.lying(value, tuple(range(len(value.sizes))))

    # steps

    def _input(self, step: Input) -> None:
        if step.codes is None:
            raise refusal(
                f"input {step.name}", "it is not quantized", "search with --activation-bits 8"
            )
        sizes = self._sizes(step.out)
        self.values[step.out] = self.buffers.new(sizes, self.buffers.order(len(sizes)), step.codes)

    def _convolution(self, step: Convolution) -> None:
        rank = len(step.stride)
        last = (*range(1, rank + 1), 0)
        source = self.buffers.lying(self._source(step), last)
        sizes = (len(step.weights), *self._sizes(step.out)[1:])
        target = self.buffers.new(sizes, last, self._codes(step.out))
        kernel = step.weights.shape[2:]
        taps = step.weights.reshape(len(step.weights), step.weights.shape[1], -1)
        rows = taps.transpose(0, 2, 1).reshape(len(step.weights), -1)
        self.buffers.operations.append(
            Conv(
                name=step.name,
                source=source,
                target=target,
                rows=pack_rows(rows, self.layers[step.name]),
                rescale=step.rescale,
                sizes=_three(source.sizes[1:], 1),
                out_sizes=_three(sizes[1:], 1),
                kernel=_three(kernel, 1),
                stride=_three(step.stride, 1),
                padding=_three([before for before, _ in step.padding], 0),
                dilation=_three(step.dilation, 1),
                spread=_three(step.input_stride, 1),
                channels=source.sizes[0],
                out_channels=len(step.weights),
                groups=step.groups,
                bits=step.accumulator_bits,
            )
        )
        self.values[step.out] = target

    def _matmul(self, step: MatMul) -> None:
        source = self._source(step)
        natural = tuple(range(len(source.sizes)))
        source = self.buffers.lying(source, natural)
        sizes = (*source.sizes[:-1], len(step.weights))
        target = self.buffers.new(sizes, natural, self._codes(step.out))
        n_rows = source.n // source.sizes[-1]
        ones = (1, 1, 1)
        self.buffers.operations.append(
            Conv(
                name=step.name,
                source=source,
                target=target,
                rows=pack_rows(step.weights, self.layers[step.name]),
                rescale=step.rescale,
                sizes=(1, 1, n_rows),
                out_sizes=(1, 1, n_rows),
                kernel=ones,
                stride=ones,
                padding=(0, 0, 0),
                dilation=ones,
                spread=ones,
                channels=source.sizes[-1],
                out_channels=len(step.weights),
                groups=1,
                bits=step.accumulator_bits,
            )
        )
        self.values[step.out] = target

    def _spread(self, values: Sequence[Value], sizes: tuple[int, ...]) -> list[Value]:
        """The values with the shape `sizes`, all lying as the first of that shape does."""
        orders = [v.order for v in values if v.sizes == sizes]
        order = orders[0] if orders else self.buffers.order(len(sizes))
        out = []
        for value in values:
            numbers = np.arange(value.n).reshape(value.lies).transpose(np.argsort(value.order))
            wide = np.broadcast_to(numbers, sizes)
            if value.sizes == sizes and value.order == order:
                out.append(value)
            else:
                out.append(self.buffers.moved("spread", value, wide.transpose(order), sizes, order))
        return out

    def _combine(self, step: Combine) -> None:
        sizes = self._sizes(step.out)
        sources = self._spread([self.values[s] for s in step.sources], sizes)
        order = sources[0].order
        target = self.buffers.new(sizes, order, self._codes(step.out))
        inner = _inner(step.name, step.rescale, target)
        self.buffers.operations.append(Sum(step.name, tuple(sources), target, step.rescale, inner))
        self.values[step.out] = target

    def _multiply(self, step: Multiply) -> None:
        sizes = self._sizes(step.out)
        left, right = self._spread([self.values[s] for s in step.sources], sizes)
        target = self.buffers.new(sizes, left.order, self._codes(step.out))
        self.buffers.operations.append(Product(step.name, (left, right), target, step.rescale))
        self.values[step.out] = target

    def _average(self, step: Average) -> None:
        source = self._source(step)
        windows = {a - 1: span for a, span in zip(step.axes, step.windows, strict=True)}
        counts = [len(windows[a][0]) if a in windows else n for a, n in enumerate(source.sizes)]
        target = self._pool(step, "sum", source, windows, dict.fromkeys(windows, 1), counts)
        if not step.keep_axes:
            target = _without_axes(target, sorted(windows))
        self.values[step.out] = target

    def _pool(
        self,
        step: Step,
        kind: str,
        source: Value,
        windows: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]],
        steps: dict[int, int],
        counts: Sequence[int],
    ) -> Value:
        if len(source.sizes) > 4:
            raise refusal(step.name, "it pools a value of more than five axes", "reshape it before")
        target = self.buffers.new(counts, source.order, self._codes(step.out))
        front = 4 - len(source.sizes)
        rescale = getattr(step, "rescale", None)
        if rescale is not None:
            rescale = _by_position(step.name, rescale, target)
        self.buffers.operations.append(
            Pool(
                name=step.name,
                kind=kind,
                source=source,
                target=target,
                sizes=(1,) * front + source.lies,
                out_sizes=(1,) * front + target.lies,
                windows=(None,) * front + tuple(windows.get(a) for a in source.order),
                step=(1,) * front + tuple(steps.get(a, 1) for a in source.order),
                rescale=rescale,
            )
        )
        return target

    def _concatenate(self, step: Concatenate) -> None:
        sizes = self._sizes(step.out)
        order = self._source(step).order
        target = self.buffers.new(sizes, order, self._codes(step.out))
        axis = order.index(step.axis - 1)
        inner = int(np.prod(target.lies[axis + 1 :], dtype=np.int64))
        outer = int(np.prod(target.lies[:axis], dtype=np.int64))
        offset = 0
        for number, rescale in zip(step.sources, step.rescales, strict=True):
            source = self.buffers.lying(self.values[number], order)
            n = source.sizes[step.axis - 1] * inner
            pitch = target.lies[axis] * inner
            self.buffers.operations.append(
                Part(step.name, source, target, rescale, outer, n, pitch, offset)
            )
            offset += n
        self.values[step.out] = target

    # operators that only move or compare

    def _move(self, step: Move) -> None:
        if step.op == "getitem":
            source, position = step.args
            assert isinstance(source, Ref)
            maker = self.static[source.index]
            self.values[step.out] = maker(step, position)
            return
        if any(s not in self.values and s not in self.static for s in step.sources):
            raise refusal(step.name, "it moves by numbers known only at run time", "use --to onnx")
        if self.nodes[step.out].op in SPLITTING:
            self.static[step.out] = lambda item, position: self._moving(step, item, position)
            return
        self.values[step.out] = self._moving(step, step, None)

    def _moving(self, step: Move, item: Move, position: StepArg) -> Value:
        """The value of a move, or its part number `position`, which step `item` picks."""
        source = self._source(step)
        if step.op == "relu.default":
            return self._relu(step, source)
        found = windows_of_maximum(
            step.op, self._plain(step.args[1:], step), source.sizes, self.nodes[step.out].shape[1:]
        )
        if found is not None:
            if position not in (None, 0):
                raise refusal(
                    item.name, "it needs the places of the largest values", "use --to torch"
                )
            target = self._pool(
                item, found.kind, source, dict(found.windows), dict(found.steps), found.counts
            )
            return target if found.keeps else _without_axes(target, sorted(found.windows))
        if step.op in SORTING:
            raise refusal(item.name, f"it sorts values ({step.op})", "use --to torch")
        numbers = np.arange(1, source.n + 1).reshape(source.lies)
        numbers = numbers.transpose(np.argsort(source.order)).astype(np.float64)
        wide = torch.from_numpy(np.ascontiguousarray(numbers))[None]
        moved = implementation(step.op)(wide, *self._plain(step.args[1:], step))
        if position is not None:
            moved = moved[position]
        if not isinstance(moved, torch.Tensor) or moved.dim() < 1 or moved.shape[0] != 1:
            raise refusal(item.name, f"{step.op} has no form with fixed places", "use --to onnx")
        logical = moved[0].numpy().astype(np.int64) - 1
        assert HOLE == -1
        same_rank = logical.ndim == len(source.sizes)
        order = source.order if same_rank else self.buffers.order(logical.ndim)
        if logical.ndim in self.buffers.spatial_ranks:
            order = self.buffers.order(logical.ndim)
        return self.buffers.moved(item.name, source, logical.transpose(order), logical.shape, order)

    def _relu(self, step: Move, source: Value) -> Value:
        target = self.buffers.new(source.sizes, source.order, source.codes)
        self.buffers.operations.append(Relu(step.name, source, target))
        return target

    def _call(self, step: Call) -> None:
        if step.reason:
            raise refusal(
                step.name,
                f"{step.op} would run in float: {step.reason}",
                "replace the operator, or export with --to onnx",
            )
        if step.op == "sym_size.int" or all(source in self.static for source in step.sources):
            self.static[step.out] = plain_call(step, self.static, self.graph)

    def _plain(self, args: tuple[StepArg, ...], step: Move | Call) -> list[Any]:
        found = plain_args(step.op, args, self.static, self.graph)
        if found is None:
            computed = [r.index for r in refs_in_args(args) if r.index not in self.static]
            names = ", ".join(self.nodes[index].name for index in computed)
            raise refusal(step.name, f"it reads {names} as numbers", "use --to onnx")
        return found


def _three(sizes: Sequence[int], fill: int) -> Sizes:
    d, h, w = (*[fill] * (3 - len(sizes)), *(int(n) for n in sizes))
    return d, h, w


def _without_axes(value: Value, gone: Sequence[int]) -> Value:
    """The same memory without axes of length 1."""
    left = [axis for axis in range(len(value.sizes)) if axis not in gone]
    order = tuple(left.index(axis) for axis in value.order if axis in left)
    return Value(value.buffer, tuple(value.sizes[a] for a in left), order, value.codes)


def _inner(name: str, rescale: Rescale, target: Value) -> int:
    """How many elements in a row share constants: those after the one axis that has its own."""
    shape = np.broadcast_shapes(rescale.shift.shape, (1,) * (len(target.sizes) + 1))[1:]
    varying = [axis for axis, size in enumerate(shape) if size > 1]
    if not varying:
        return target.n
    if len(varying) > 1:
        raise refusal(name, "its constants vary along two axes", "use --to onnx")
    at = target.order.index(varying[0])
    return int(np.prod(target.lies[at + 1 :], dtype=np.int64))


def _by_position(name: str, rescale: Rescale, target: Value) -> Rescale:
    """Constants of a sum over windows, flat: one set, or one per position but channels."""
    if rescale.shift.size == 1:
        return rescale
    n_channels = target.lies[-1]
    full = target.n // n_channels

    def flat(array: NDArray[np.int64]) -> NDArray[np.int64]:
        wide = np.broadcast_to(array, (1, *target.sizes))[0].transpose(target.order)
        rows = wide.reshape(full, n_channels)
        if (rows != rows[:, :1]).any():
            raise refusal(name, "its divisor varies along the channels", "use --to onnx")
        return np.ascontiguousarray(rows[:, 0])

    return Rescale(
        tuple(flat(m) for m in rescale.multipliers),
        flat(rescale.offset),
        flat(rescale.shift),
        rescale.zero_point,
        rescale.low,
        rescale.high,
    )
