"""Multiplier, offset and clamp behind an accumulator: adders, registers between stages, depth.

The counts follow the circuit that `symbols.clamped_floor` lays out. Of a register only the bits
count that something reads: not those below the code where nothing is added any more, not those
that a wider value beside it holds as well, and of a comparison only the sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models.fpga.adders import ADDERS_PER_STAGE, bits_between
from cost_models.fpga.sharing import signed_digits
from quant_ops.narrow import NarrowRescale


@dataclass(frozen=True, slots=True)
class Operand:
    """A value between `low` and `high` that `depth` adders come before."""

    low: int
    high: int
    depth: int


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What a rescaling of one output takes.

    Attributes:
        product_bits: adder bits of the multipliers, and of the sum of several products.
        offset_bits: bits to which a constant is added.
        clamp_bits: code bits that a clamp decides.
        excess_bits: bits above the code that a clamp looks at.
        product_registers: bits held between the accumulator and the product.
        clamp_registers: bits held between the comparisons of a clamp.
        code_bits: of the result.
        depth: adders on the longest way to the result, those before it included.
    """

    product_bits: int = 0
    offset_bits: int = 0
    clamp_bits: int = 0
    excess_bits: int = 0
    product_registers: int = 0
    clamp_registers: int = 0
    code_bits: int = 0
    depth: int = 0


def quantizer(rescale: NarrowRescale, operands: Sequence[Operand]) -> Quantizer:
    """Count a rescaling.

    Args:
        rescale: its constants; the zero point must be part of the offset.
        operands: one per multiplier.
    """
    used = [(m, o) for m, o in zip(rescale.multipliers, operands, strict=True) if m]
    if not used:
        return Quantizer()
    products = _Products(_lowest_read(rescale))
    low, high, depth = products.add_up(used)
    width = bits(low + rescale.offset, high + rescale.offset)
    zeros = (rescale.offset & -rescale.offset).bit_length() - 1
    below, above = (v + rescale.offset >> rescale.shift for v in (low, high))
    code_bits = bits(max(below, rescale.low), min(above, rescale.high))
    clamp_bits = clamp_registers = 0
    reach = (below, above)
    if below < rescale.low:
        clamp_bits = code_bits
        if rescale.low < 0:  # below 0 a sign decides, at no depth of its own
            clamp_registers += (1 + bits(below, above)) * crossed(depth, depth + 1)
            depth += 1
        below = rescale.low
    if above > rescale.high:
        clamp_bits = code_bits
        clamp_registers += (1 + code_bits) * crossed(depth, depth + 1)
        depth += 1
    return Quantizer(
        product_bits=products.adder_bits,
        offset_bits=max(width - zeros, 0) if rescale.offset else 0,
        clamp_bits=clamp_bits,
        excess_bits=max(bits(*reach) - code_bits, 0) if clamp_bits else 0,
        product_registers=products.registers(),
        clamp_registers=clamp_registers,
        code_bits=code_bits,
        depth=depth,
    )


def stage_of(depth: int) -> int:
    """The stage in which a value of some depth is made."""
    return max(depth - 1, 0) // ADDERS_PER_STAGE


def crossed(first: int, last: int) -> int:
    """Registers in a row that hold a value made at depth `first` for a reader at `last`."""
    return max(stage_of(last) - stage_of(first), 0)


def bits(low: int, high: int) -> int:
    """Bits of an integer between two bounds, a sign included where it may be negative."""
    return int(bits_between(np.array([low]), np.array([high]))[0])


def digits_of(multiplier: int) -> list[tuple[int, int]]:
    """(place, sign) of the digits of a positive multiplier, the highest first.

    >>> digits_of(7)
    [(3, 1), (0, -1)]
    """
    (digits,) = signed_digits(np.array([multiplier]))
    return [(int(place), int(digits[place])) for place in np.flatnonzero(digits)[::-1]]


def _lowest_read(rescale: NarrowRescale) -> int:
    """Below this place nothing is added to a product and nothing of it is read."""
    zeros = (rescale.offset & -rescale.offset).bit_length() - 1
    return min(zeros, rescale.shift) if rescale.offset else rescale.shift


@dataclass(slots=True)
class _Value:
    """An operand times some digits of its multiplier, or a sum of such."""

    low: int
    high: int
    place: int  # bits below are 0
    depth: int
    last: int  # depth from which it is read for the last time
    leaves: tuple[int, ...]
    copied: int = 0  # lowest bits, which are those of its operand
    operand: int = -1


class _Products:
    """Values in the order in which they are made; digits are leaves, and cost nothing."""

    def __init__(self, lowest_read: int) -> None:
        self._lowest_read = lowest_read
        self._leaves: list[_Value] = []
        self._sums: list[_Value] = []
        self.adder_bits = 0

    def add_up(self, products: Sequence[tuple[int, Operand]]) -> tuple[int, int, int]:
        """Smallest and largest sum of the products, and its depth."""
        total: _Value | None = None
        for number, (multiplier, operand) in enumerate(products):
            product = self._tree([self._leaf(number, operand, *d) for d in digits_of(multiplier)])
            product.low, product.high = operand.low * multiplier, operand.high * multiplier
            total = product if total is None else self._sum(total, product)
        assert total is not None
        return total.low, total.high, total.depth

    def _leaf(self, number: int, operand: Operand, place: int, sign: int) -> _Value:
        low, high = sorted((sign * operand.low << place, sign * operand.high << place))
        leaf = _Value(low, high, place, operand.depth, operand.depth, (len(self._leaves),))
        leaf.operand, leaf.copied = number, sign
        self._leaves.append(leaf)
        return leaf

    def _tree(self, values: list[_Value]) -> _Value:
        while len(values) > 1:
            pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
            values = [self._sum(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0]

    def _sum(self, one: _Value, two: _Value) -> _Value:
        depth = max(one.depth, two.depth) + 1
        one.last = two.last = depth
        out = _Value(
            one.low + two.low, one.high + two.high, min(one.place, two.place), depth, depth,
            one.leaves + two.leaves,
        )  # fmt: skip
        is_product = one.operand == two.operand >= 0
        if is_product and two.copied > 0:
            out.copied, out.operand = one.place - two.place, one.operand
        overlap = bits(out.low, out.high) - max(one.place, two.place)
        self.adder_bits += max(overlap, 0)
        self._sums.append(out)
        return out

    def registers(self) -> int:
        """Bits that cross from stage to stage."""
        total = 0
        held: dict[int, _Value] = {}
        for leaf in self._leaves:
            if leaf.operand not in held or held[leaf.operand].last < leaf.last:
                held[leaf.operand] = leaf
        for leaf in held.values():
            total += crossed(leaf.depth, leaf.last) * self._read_bits(leaf)
        for value in self._sums:
            total += crossed(value.depth, value.last) * self._read_bits(value)
            source = held.get(value.operand)
            if source is not None:
                both = crossed(value.depth, min(value.last, source.last))
                unread = max(self._unread(value), self._unread(source))
                total -= both * max(value.copied - unread, 0)
        return total

    def _read_bits(self, value: _Value) -> int:
        return max(bits(value.low, value.high) - value.place - self._unread(value), 0)

    def _unread(self, value: _Value) -> int:
        """Lowest bits that no later addition meets and no code needs."""
        others = [leaf.place for at, leaf in enumerate(self._leaves) if at not in value.leaves]
        return max(min([self._lowest_read, *others]) - value.place, 0)
