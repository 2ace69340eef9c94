"""C text of numbers, constant arrays and what a kernel is told of a value."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from quant_ops.requantize import Rescale
from search.exporters.c.network import TYPES, Value

BYTES = {"uint8": 1, "uint16": 2, "int16": 2, "int32": 4, "int64": 8}


class Constants:
    """The constant arrays of a library.

    Attributes:
        lines: their text.
        n_bytes: of all of them (alignment between them apart).
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.n_bytes = 0

    def add(self, line: str, n_bytes: int) -> None:
        """Any other constant."""
        self.lines.append(line)
        self.n_bytes += n_bytes

    def array(self, kind: str, label: str, values: Iterable[int]) -> str:
        """A constant array; its name."""
        numbers = [int(v) for v in values]
        self.n_bytes += BYTES[kind] * len(numbers)
        text = [_number(kind, v) for v in numbers]
        rows, line = [], "   "
        for item in text:
            if len(line) + len(item) + 2 > 100:
                rows.append(line)
                line = "   "
            line += f" {item},"
        rows.append(line)
        self.lines += [f"static const {kind}_t {label}[] = {{", *rows, "};"]
        return label

    def rescaling(self, index: int, rescale: Rescale, order: NDArray[np.int64] | None) -> str:
        """Names of the arrays multiplier, offset, shift, one entry per set."""
        shape = np.broadcast_shapes(
            *(m.shape for m in rescale.multipliers), rescale.offset.shape, rescale.shift.shape
        )
        flat = [
            np.broadcast_to(a, shape).reshape(-1)
            for a in (*rescale.multipliers, rescale.offset, rescale.shift)
        ]
        if order is not None and flat[0].size > 1:
            flat = [a[order] for a in flat]
        *multipliers, offset, shift = flat
        m = self.array("int32", f"m{index}", np.concatenate(multipliers))
        o = self.array("int64", f"o{index}", offset)
        s = self.array("uint8", f"s{index}", shift)
        return f"{m}, {o}, {s}"


def _number(kind: str, value: int) -> str:
    if kind == "int64":
        return f"INT64_C({value})"
    return "BF_HOLE" if kind == "int32" and value == -(2**31) else str(value)


def type_of(value: Value) -> int:
    """Number of its type, as the kernels count them."""
    return list(TYPES).index(value.type)


def as_input(value: Value) -> str:
    """How a kernel reads it."""
    return f"(bf_in){{{type_of(value)}, {value.codes.zero_point}}}"


def as_output(value: Value, rescale: Rescale | None = None) -> str:
    """How a kernel writes it."""
    meaning = value.codes if rescale is None else rescale
    return f"(bf_out){{{type_of(value)}, {meaning.zero_point}, {meaning.low}, {meaning.high}}}"


def scalars(rescale: Rescale) -> str:
    """A rescaling of one set of constants."""
    (multiplier,) = rescale.multipliers
    return f"{multiplier.item()}, INT64_C({rescale.offset.item()}), {rescale.shift.item()}"


def float_text(value: float) -> str:
    """A float32 number that C reads back exactly."""
    return f"{float(np.float32(value)):.9g}" if value != int(value) else f"{int(value)}.0"
