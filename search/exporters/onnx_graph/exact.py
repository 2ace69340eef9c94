"""The normative rescaling (REQUANTIZATION.md, section 3) in ONNX operators, bit for bit.

    code = clamp(((a_1 M_1 + ... + a_k M_k + O) >> n) + z)

First `quant_ops.narrow` shortens M, O and n as far as every code stays, for all sums that can
occur. Then, where |a_1 M_1| + ... + |O| stays below 2^53, the sum runs in float64: every product
and every partial sum is a whole number below 2^53 times 2^-n, hence exact in any order, fused or
not, and the floor is all that is left to do. Below 2^24 float32 is enough; from 2^53 on it runs in
int64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quant_ops.machine import FLOAT32_EXACT, FLOAT64_EXACT
from quant_ops.narrow import NarrowRescale, channel_of, narrowed
from quant_ops.requantize import PRODUCT_LIMIT, Codes, Rescale
from quant_ops.runtime_mode import is_wide
from search.exporters.onnx_graph.builder import GraphBuilder, Unsupported
from search.exporters.onnx_graph.state import WriterState

WORTH_A_CAST = 8  # numbers: the node that widens them takes about as many bytes as it saves


@dataclass(frozen=True, slots=True)
class Term:
    """One accumulator: the integers number / unit - zero.

    Attributes:
        name: tensor of numbers, of a type that holds them exactly.
        reach: smallest and largest accumulator.
        zero: what is subtracted.
        unit: a power of two.
    """

    name: str
    reach: tuple[int, int]
    zero: int = 0
    unit: float = 1.0

    @property
    def bound(self) -> int:
        """Largest magnitude of number / unit."""
        return max(abs(end + self.zero) for end in self.reach)


@dataclass(frozen=True, slots=True, eq=False)
class _Constants:
    """(sum of number_i / unit_i * multipliers_i + offset) >> shift, arrays of one shape.

    Zero points are inside the offset. No product and no partial sum exceeds `largest`.
    """

    multipliers: Sequence[NDArray[np.int64]]
    offset: NDArray[np.int64]
    shift: NDArray[np.int64]
    largest: int


def source_term(state: WriterState, number: int) -> Term:
    """A value that has codes: bytes above the lowest code, or a wide value as a real number."""
    codes, name = state.codes(number), state.value(number)
    if is_wide(codes):
        return Term(name, codes.reach, unit=codes.scale)
    return Term(name, codes.reach, zero=state.zero(number))


def rescaled(state: WriterState, out: int, rescale: Rescale, terms: Sequence[Term]) -> str:
    """Codes of a step's result, held as all codes are (see `WriterState`).

    Raises:
        Unsupported: int64 is not proven to hold its sums.
    """
    codes = state.codes(out)
    constants = _constants(codes, rescale, terms)
    lowest = 0 if is_wide(codes) else codes.low
    limits = rescale.low - lowest, rescale.high - lowest
    if constants.largest >= FLOAT64_EXACT:
        return _in_int64(state.builder, codes, limits, constants, terms)
    dtype = "float32" if constants.largest < FLOAT32_EXACT else "float64"
    return _in_floats(state.builder, codes, limits, constants, terms, dtype)


def _constants(codes: Codes, rescale: Rescale, terms: Sequence[Term]) -> _Constants:
    shape, size = rescale.shift.shape, rescale.shift.size
    lifted = 0 if is_wide(codes) else codes.zero_point - codes.low
    reaches = [term.reach for term in terms]
    channels = [_shortest(channel_of(rescale, c), lifted, reaches) for c in range(size)]
    offsets, largest = [], 0
    for channel in channels:
        pairs = list(zip(terms, channel.multipliers, strict=True))
        offsets.append(channel.offset - sum(term.zero * m for term, m in pairs))
        products = sum(term.bound * abs(m) for term, m in pairs)
        largest = max(largest, products + abs(offsets[-1]))
    if largest > PRODUCT_LIMIT:
        raise Unsupported(
            "its rescaling exceeds 64-bit integers",
            "give its weights or its input fewer bits, or export with --arithmetic runtime",
        )
    return _Constants(
        [_array([c.multipliers[i] for c in channels], shape) for i in range(len(terms))],
        _array(offsets, shape),
        _array([c.shift for c in channels], shape),
        largest,
    )


def _array(values: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(values, np.int64).reshape(shape)


def _shortest(
    exact: NarrowRescale, lifted: int, reaches: Sequence[tuple[int, int]]
) -> NarrowRescale:
    """The shortest constants, z inside the offset: results are `lifted` above sums >> shift."""
    if not any(exact.multipliers):
        return _lifted(_constant(exact), lifted)
    above = _lifted(exact, lifted)
    bounds = [max(abs(end) for end in reach) for reach in reaches]
    products = sum(b * abs(m) for b, m in zip(bounds, exact.multipliers, strict=True))
    if products + abs(above.offset) <= PRODUCT_LIMIT:
        return _constant(narrowed(above, *reaches))
    return _constant(_lifted(narrowed(exact, *reaches), lifted))


def _lifted(channel: NarrowRescale, lifted: int) -> NarrowRescale:
    moved = lifted - channel.zero_point
    return replace(
        channel,
        offset=channel.offset + (lifted << channel.shift),
        zero_point=0,
        low=channel.low + moved,
        high=channel.high + moved,
    )


def _constant(channel: NarrowRescale) -> NarrowRescale:
    """A channel whose sums do not matter gets its code as the offset; others stay."""
    if any(channel.multipliers):
        return channel
    code = (channel.offset >> channel.shift) + channel.zero_point
    code = min(max(code, channel.low), channel.high)
    return replace(channel, offset=code - channel.zero_point, shift=0)


def _in_floats(
    builder: GraphBuilder, codes: Codes, limits: tuple[int, int], constants: _Constants,
    terms: Sequence[Term], dtype: str,
) -> str:  # fmt: skip
    parts = []
    for term, multiplier in zip(terms, constants.multipliers, strict=True):
        factor = np.ldexp(multiplier.astype(np.float64), -constants.shift) / term.unit
        parts.append(
            builder.node("Mul", [builder.cast(term.name, dtype), _short(builder, factor, dtype)])
        )
    offset = np.ldexp(constants.offset.astype(np.float64), -constants.shift)
    real = _added(builder, [*parts, _short(builder, offset, dtype)])
    ends = [builder.constant(np.array(end, dtype)) for end in limits]
    if not is_wide(codes):  # not negative once it is clamped, so that the cast is the floor
        return builder.cast(builder.node("Clip", [real, *ends]), "uint8")
    whole = builder.node("Clip", [builder.node("Floor", [real]), *ends])
    scale = builder.constant(np.array(codes.scale, dtype))
    return builder.cast(builder.node("Mul", [whole, scale]), "float32")


def _short(builder: GraphBuilder, array: NDArray[np.float64], dtype: str) -> str:
    """A constant in four bytes a number where these hold it exactly; widened at load."""
    narrow = array.astype(np.float32)
    if dtype == "float32":
        return builder.constant(narrow)
    if array.size < WORTH_A_CAST or not np.array_equal(narrow, array):
        return builder.constant(array)
    return builder.cast(builder.constant(narrow), dtype)


def _in_int64(
    builder: GraphBuilder, codes: Codes, limits: tuple[int, int], constants: _Constants,
    terms: Sequence[Term],
) -> str:  # fmt: skip
    """Div rounds towards 0, hence the remainder, which is never negative, is taken off first.

    The multiple of 2^n that is left is int64 too: of -3 2^61, the least sum, it is at least -2^63.
    """
    parts = []
    for term, multiplier in zip(terms, constants.multipliers, strict=True):
        name = term.name
        if term.unit != 1.0:
            name = builder.node("Mul", [name, builder.constant(np.float32(1 / term.unit))])
        parts.append(
            builder.node("Mul", [builder.cast(name, "int64"), builder.constant(multiplier)])
        )
    total = _added(builder, [*parts, builder.constant(constants.offset, np.int64)])
    power = builder.constant(np.int64(1) << constants.shift, np.int64)
    multiple = builder.node("Sub", [total, builder.node("Mod", [total, power])])
    whole = builder.node("Div", [multiple, power])
    clamped = builder.node("Clip", [whole, *(builder.constant(np.int64(x)) for x in limits)])
    if not is_wide(codes):
        return builder.cast(clamped, "uint8")
    scale = builder.constant(np.float32(codes.scale))
    return builder.node("Mul", [builder.cast(clamped, "float32"), scale])


def _added(builder: GraphBuilder, parts: Sequence[str]) -> str:
    total = parts[0]
    for part in parts[1:]:
        total = builder.node("Add", [total, part])
    return total
