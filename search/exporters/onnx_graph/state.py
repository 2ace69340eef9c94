"""What the writers of single steps share."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant_ops.graph import Node, Ref
from quant_ops.program import Constant, IntegerProgram, Step, StepArg
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.requantize import Codes, Rescale
from quant_ops.runtime_mode import is_wide, real_limits
from search.exporters.onnx_graph.builder import GraphBuilder, Unsupported

Value: TypeAlias = "str | list[str]"
LARGEST_CODE = 255


class WriterState:
    """Values written so far.

    Codes are uint8 tensors, code - lowest, so that every type of activation runs through the
    kernels for unsigned ones. Wide values are float32 real numbers, sizes int64 tensors of one
    element, operators with several results lists of names.

    With `exact`, rescalings are the normative ones (`exact.py`), else those of
    `quant_ops.runtime_mode`.
    """

    def __init__(
        self, model: QuantizedModel, program: IntegerProgram, *, exact: bool = False
    ) -> None:
        self.builder = GraphBuilder()
        self.exact = exact
        self.model = model
        self.graph = model.graph
        self.program = program
        self.values: dict[int, Value] = {}

    def codes(self, number: int) -> Codes:
        """Meaning of a value that has codes."""
        codes = self.program.codes[number]
        assert codes is not None
        return codes

    def is_codes(self, number: int) -> bool:
        """Whether a value is a uint8 tensor of codes."""
        codes = self.program.codes[number]
        return codes is not None and not is_wide(codes)

    def value(self, number: int) -> str:
        """Name of a value that is one tensor."""
        value = self.values[number]
        assert isinstance(value, str)
        return value

    def zero(self, number: int) -> int:
        """The uint8 that stands for 0."""
        codes = self.codes(number)
        return codes.zero_point - codes.low

    def layer_of(self, step: Step) -> QuantizedLayer:
        """The stored weights of a layer's step."""
        return self.model.layers[self.graph.layer_at[self.graph.index_of[step.name]].name]

    def centered(self, number: int, moved: str | None = None) -> str:
        """float32 code - zero point; of a wide value the real number.

        Args:
            number: of the value.
            moved: the same codes, spread or padded.
        """
        value = self.value(number) if moved is None else moved
        if not self.is_codes(number):
            return value
        whole = self.builder.cast(value, "float32")
        zero = self.zero(number)
        if zero == 0:
            return whole
        return self.builder.node("Sub", [whole, self.builder.constant(np.float32(zero))])

    def dequantized(self, number: int) -> str:
        """float32: what the codes stand for. No DequantizeLinear, which would be fused."""
        if not self.is_codes(number):
            return self.value(number)
        scale = self.builder.constant(np.float32(self.codes(number).scale))
        return self.builder.node("Mul", [self.centered(number), scale])

    def quantized(self, real: str, codes: Codes, scale: float | None = None) -> str:
        """uint8 codes of float32 numbers, halves to even, saturated."""
        unit = self.builder.constant(np.float32(codes.scale if scale is None else scale))
        zero = self.builder.constant(np.uint8(codes.zero_point - codes.low))
        whole = self.builder.node("QuantizeLinear", [real, unit, zero])
        return self.clipped(whole, 0, codes.high - codes.low)

    def clipped(self, value: str, low: int, high: int) -> str:
        """uint8 limits, where they are narrower than the type."""
        ends = ["", ""]
        if low > 0:
            ends[0] = self.builder.constant(np.uint8(low))
        if high < LARGEST_CODE:
            ends[1] = self.builder.constant(np.uint8(high))
        if ends == ["", ""]:
            return value
        return self.builder.node("Clip", [value, *ends[: 2 if ends[1] else 1]])

    def finished(self, out: int, rescale: Rescale, total: str) -> str:
        """A sum in units of the result: rounded and clamped, or, of a wide one, clamped."""
        codes = self.codes(out)
        if not is_wide(codes):
            whole = self.quantized(total, _widest(codes), 1.0)
            return self.clipped(whole, rescale.low - codes.low, rescale.high - codes.low)
        low, high = real_limits(codes, rescale)
        if low is None and high is None:
            return total
        ends = ["" if end is None else self.builder.constant(end) for end in (low, high)]
        return self.builder.node("Clip", [total, *ends])

    def node_of(self, step: Step) -> Node:
        """The graph's node that gives the step its meaning."""
        return self.graph.nodes[self.graph.index_of[step.name]]

    def shape_argument(self, sizes: StepArg) -> str:
        """int64 tensor of a shape; a single computed size becomes -1."""
        assert isinstance(sizes, tuple)
        computed = [i for i, size in enumerate(sizes) if isinstance(size, Ref)]
        if (len(computed) <= 1 and -1 not in sizes) or not computed:
            return self.builder.ints(*(-1 if isinstance(s, Ref) else int_of(s) for s in sizes))
        parts = [
            self.value(s.index) if isinstance(s, Ref) else self.builder.ints(int_of(s))
            for s in sizes
        ]
        return self.builder.node("Concat", parts, axis=0)


def _widest(codes: Codes) -> Codes:
    return Codes(1.0, codes.zero_point, codes.low, codes.low + LARGEST_CODE)


def int_of(arg: StepArg) -> int:
    """A plain whole number among the arguments.

    Raises:
        Unsupported: it is computed while the network runs.
    """
    if isinstance(arg, bool | int):
        return int(arg)
    raise Unsupported("one of its sizes is computed while it runs", "fix that size in the model")


def ints_of(arg: StepArg) -> list[int]:
    """Plain whole numbers: one or several."""
    return [int_of(a) for a in arg] if isinstance(arg, tuple) else [int_of(arg)]


def array_of(arg: StepArg) -> NDArray[Any]:
    """A parameter tensor among the arguments."""
    if isinstance(arg, Constant):
        return arg.array
    raise Unsupported("it reads a computed tensor where a parameter is wanted", "keep it fixed")


def argument(args: Sequence[StepArg], position: int, default: StepArg = None) -> StepArg:
    """The argument at `position`, or what it is when it is not written."""
    return args[position] if position < len(args) else default
