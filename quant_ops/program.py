"""An integer program: every step of a quantized network, with all its constants.

A step reads numbered values and writes one. A value is either a tensor of integers, whose
meaning `IntegerProgram.codes` gives, or anything else (float tensor, index tensor, truth
values, a size, several tensors). The first dimension of every tensor is the batch. The steps
are all that a code generator needs: what they compute is stated here and in REQUANTIZATION.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant_ops.graph import Ref
from quant_ops.requantize import Codes, Rescale

WeightCodes = NDArray[np.int16]


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A parameter tensor among the arguments of an operator."""

    array: NDArray[np.generic]


StepArg: TypeAlias = "bool | int | float | str | Ref | Constant | tuple[StepArg, ...] | None"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Step:
    """Base of all steps.

    Attributes:
        out: number of the value that is written (the graph's node index).
        name: name of the graph's node that gives the step its meaning.
        sources: numbers of the values that are read.
        zero_points: for each source its zero point (0 for one without codes). Arithmetic steps
            subtract it first, so that 0 stands for 0, in padding too.
    """

    out: int
    name: str
    sources: tuple[int, ...]
    zero_points: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Input(Step):
    """Network input number `position`. With `codes`: round-half-even(x / scale) in float32."""

    position: int
    codes: Codes | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Convolution(Step):
    """Cross-correlation over any number of spatial axes, then a rescaling per output channel.

    The source, minus its zero point, is spread with `input_stride` - 1 zeros between neighbours
    (a transposed convolution), padded with zeros (negative: cropped), and correlated.

    Attributes:
        weights: (out_channels, in_channels / groups, *kernel).
        padding: (before, after) for each spatial axis.
        bound: no partial sum, in any order, exceeds this magnitude.
        accumulator_bits: 32 where `bound` proves that int32 cannot overflow, else 64.
        rescale: constants (out_channels, 1, ...).
    """

    weights: WeightCodes
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    input_stride: tuple[int, ...]
    groups: int
    bound: int
    accumulator_bits: int
    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MatMul(Step):
    """Linear layer over the last axis. weights: (out, in); constants of `rescale`: (out,)."""

    weights: WeightCodes
    bound: int
    accumulator_bits: int
    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Lookup(Step):
    """Row `index` of `weights` (rows, size), rescaled by that row's constants (rows, 1)."""

    weights: WeightCodes
    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Combine(Step):
    """Rescaled sum of the sources: add, sub, scaling, a clamp of its own, channel affine maps."""

    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Multiply(Step):
    """Rescaled product of two sources."""

    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Average(Step):
    """Sums over windows, then a rescaling whose multiplier contains 1 / count.

    Attributes:
        axes: which axes are reduced, ascending.
        windows: for each of them (start, end), an array each with one entry per output position.
        keep_axes: False: every axis has one window and disappears.
        bound: largest magnitude of a sum.
        rescale: constants, broadcasting against the result (counts may differ by position).
    """

    axes: tuple[int, ...]
    windows: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    keep_axes: bool
    bound: int
    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Concatenate(Step):
    """The sources, each rescaled to the result's scale, joined along `axis`."""

    axis: int
    rescales: tuple[Rescale, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Move(Step):
    """An operator that only moves, drops or compares: it runs on code - zero_point.

    Hence relu is the maximum with the zero point, and padding and absent channels hold the zero
    point. Shapes for a batch of one are in the graph; arguments are those of the ATen operator.
    """

    op: str
    args: tuple[StepArg, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Call(Step):
    """An operator that runs as it is: sources with codes are dequantized to float32 before.

    Attributes:
        codes: how its float32 result is quantized (round-half-even(x / scale)), None: not at all.
        reason: why it has no integer form; empty for integers, sizes and constants.
    """

    op: str
    args: tuple[StepArg, ...]
    codes: Codes | None
    reason: str


@dataclass(frozen=True, slots=True)
class FloatIsland:
    """An operator of the program that computes in float32, and why."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A network as integer arithmetic, as far as it goes.

    Attributes:
        steps: in execution order.
        outputs: value numbers of the network's outputs.
        codes: for each value number the meaning of its integers, None if it holds none.
        edges: edge name to the number of the value quantized there, quantized edges only.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    codes: tuple[Codes | None, ...]
    edges: Mapping[str, int]

    @cached_property
    def float_islands(self) -> tuple[FloatIsland, ...]:
        """Operators that compute in float; empty for an integer-only program."""
        calls = (step for step in self.steps if isinstance(step, Call) and step.reason)
        return tuple(FloatIsland(step.name, step.op, step.reason) for step in calls)

    @cached_property
    def last_use(self) -> Mapping[int, int]:
        """Value number to the position of the last step that reads it; outputs have none."""
        last = {value: at for at, step in enumerate(self.steps) for value in step.sources}
        return {value: at for value, at in last.items() if value not in self.outputs}


def refs_in_args(arg: StepArg) -> Iterator[Ref]:
    """Every value reference inside an argument."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_in_args(item)
