"""Walks over the steps of an integer program; how codes are held is a subclass's affair."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.graph import Ref
from quant_ops.operators import implementation
from quant_ops.program import (
    Average,
    Call,
    Combine,
    Concatenate,
    Constant,
    Convolution,
    Input,
    IntegerProgram,
    Lookup,
    MatMul,
    Move,
    Multiply,
    Step,
    StepArg,
)
from quant_ops.requantize import Codes, Integers, Rescale

Array: TypeAlias = NDArray[Any]
FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a program computed.

    Attributes:
        values: the network's outputs; float32 where they are codes (scale * (code - zero_point)).
        integers: their codes as int32, None for an output that is no codes. The top class is the
            first largest integer.
        codes: edge name to its codes (batch, ...) as int32, for the edges asked for.
    """

    values: tuple[Array, ...]
    integers: tuple[NDArray[np.int32] | None, ...]
    codes: Mapping[str, NDArray[np.int32]]


class Machine(ABC):
    """Walks over the steps. Codes are held as the subclass likes, all other values in torch."""

    def __init__(self, program: IntegerProgram) -> None:
        self._program = program
        self._values: dict[int, Any] = {}
        self._inputs: Sequence[Array] = ()
        self._execute: dict[type[Step], Callable[[Any], Any]] = {
            Input: self._input,
            Convolution: self._convolution,
            MatMul: self._matmul,
            Lookup: self._lookup,
            Combine: self._combine,
            Multiply: self._multiply,
            Average: self._average,
            Concatenate: self._concatenate,
            Move: self._move,
            Call: self._call,
        }

    def run(self, inputs: Sequence[Array], keep: Sequence[str]) -> Outputs:
        wanted = {self._program.edges[name]: name for name in keep}
        kept: dict[str, NDArray[np.int32]] = {}
        self._inputs = inputs
        with torch.inference_mode(), _exact_float32():
            for at, step in enumerate(self._program.steps):
                value = self._execute[type(step)](step)
                if step.out in wanted:
                    kept[wanted[step.out]] = self._to_numpy(value).astype(np.int32)
                self._values[step.out] = value
                for source in step.sources:
                    if self._program.last_use.get(source) == at:
                        self._values.pop(source, None)
            finished = [self._output(number) for number in self._program.outputs]
        return Outputs(tuple(v for v, _ in finished), tuple(c for _, c in finished), kept)

    def _output(self, number: int) -> tuple[Array, NDArray[np.int32] | None]:
        codes = self._program.codes[number]
        if codes is None:
            return self._values[number].numpy(), None
        integers = self._to_numpy(self._values[number])
        return codes.dequantize(integers), integers.astype(np.int32)

    def _input(self, step: Input) -> Any:
        array = np.asarray(self._inputs[step.position])
        if step.codes is None:
            return torch.from_numpy(array)
        return self._from_numpy(step.codes.quantize(array))

    def _call(self, step: Call) -> Any:
        arguments = [self._argument(arg) for arg in step.args]
        value = implementation(step.op)(*arguments)
        if step.codes is None:
            return tuple(value) if isinstance(value, list | tuple) else value
        return self._from_numpy(step.codes.quantize(value.numpy()))

    def _move(self, step: Move) -> Any:
        source = self._values[step.sources[0]]
        if step.op == "getitem":
            return source[step.args[1]]
        zero_point = step.zero_points[0]
        arguments = [self._argument(arg) for arg in step.args[1:]]
        moved = implementation(step.op)(self._to_torch(source - zero_point), *arguments)
        if isinstance(moved, Tensor):
            return self._from_torch(moved) + zero_point
        return tuple(
            self._from_torch(part) + zero_point if part.is_floating_point() else part
            for part in moved
        )

    def _argument(self, arg: StepArg) -> Any:
        if isinstance(arg, Ref):
            value, codes = self._values[arg.index], self._program.codes[arg.index]
            return value if codes is None else self._dequantize(value, codes)
        if isinstance(arg, Constant):
            return torch.from_numpy(arg.array)
        if isinstance(arg, tuple):
            return [self._argument(item) for item in arg]
        if isinstance(arg, str) and arg.startswith("dtype:"):
            return getattr(torch, arg.removeprefix("dtype:"))
        return arg

    def _centered(self, step: Step) -> list[Any]:
        """The sources minus their zero points."""
        return [self._values[s] - z for s, z in zip(step.sources, step.zero_points, strict=True)]

    def _combine(self, step: Combine) -> Any:
        return self._rescale(step.rescale, *self._centered(step))

    def _multiply(self, step: Multiply) -> Any:
        left, right = self._centered(step)
        return self._rescale(step.rescale, left * right)

    def _dequantize(self, value: Any, codes: Codes) -> Tensor:
        return torch.from_numpy(codes.dequantize(self._to_numpy(value)))

    @abstractmethod
    def _to_numpy(self, value: Any) -> Integers: ...

    @abstractmethod
    def _from_numpy(self, codes: Integers) -> Any: ...

    @abstractmethod
    def _to_torch(self, value: Any) -> Tensor:
        """As a floating-point tensor that holds every code exactly."""

    @abstractmethod
    def _from_torch(self, value: Tensor) -> Any: ...

    @abstractmethod
    def _rescale(self, rescale: Rescale, *accumulators: Any) -> Any: ...

    @abstractmethod
    def _convolution(self, step: Convolution) -> Any: ...

    @abstractmethod
    def _matmul(self, step: MatMul) -> Any: ...

    @abstractmethod
    def _lookup(self, step: Lookup) -> Any: ...

    @abstractmethod
    def _average(self, step: Average) -> Any: ...

    @abstractmethod
    def _concatenate(self, step: Concatenate) -> Any: ...


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Plain float32 sums: no reduced precision, no Winograd transform (NNPACK has one)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
