"""A layer as a circuit: a constant matrix, then a rescaling of every output."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.adders import ADDERS_PER_STAGE, AdderGraph, bits_between
from cost_models.fpga.rescaling import Fixed

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Features:
    """What the fitted models know of a circuit; additive over the parts of a network.

    Attributes:
        adder_bits: of the constant matrix that take a look-up table; shared sums count once.
        carry_bits: of the constant matrix where only the carry goes on.
        adders: how many those are.
        product_bits: adder bits of the multipliers of rescalings.
        offset_bits: bits to which a rescaling adds a constant.
        clamp_bits: code bits that a clamp decides.
        excess_bits: bits above the code that a clamp looks at.
        register_bits: held between the stages of the matrix, its inputs included, and its outputs
            where they leave.
        rescale_register_bits: held in rescalings.
        code_register_bits: held until the slowest output is there, and at the end.
        depth: adders on the longest way.
    """

    adder_bits: float = 0.0
    carry_bits: float = 0.0
    adders: float = 0.0
    product_bits: float = 0.0
    offset_bits: float = 0.0
    clamp_bits: float = 0.0
    excess_bits: float = 0.0
    register_bits: float = 0.0
    rescale_register_bits: float = 0.0
    code_register_bits: float = 0.0
    depth: int = 0

    def times(self, n: int) -> "Features":
        """The same circuit `n` times, side by side."""
        return replace(self, **{name: n * getattr(self, name) for name in SUMS})

    def then(self, other: "Features") -> "Features":
        """Both, one after the other."""
        return self._with(other, self.depth + other.depth)

    def beside(self, other: "Features") -> "Features":
        """Both, at the same time."""
        return self._with(other, max(self.depth, other.depth))

    def _with(self, other: "Features", depth: int) -> "Features":
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return Features(**sums, depth=depth)


SUMS = tuple(field.name for field in fields(Features) if field.name != "depth")


@dataclass(frozen=True, eq=False)
class Circuit:
    """The outputs of one position: weights @ codes, rescaled unless they leave the network.

    Attributes:
        weights: (outputs, inputs) integers.
        low, high: smallest and largest code of an input.
        rescales: one per output, empty where the accumulators themselves leave.
    """

    weights: Ints
    low: int
    high: int
    rescales: tuple[Fixed, ...] = ()

    @cached_property
    def graph(self) -> AdderGraph:
        """The adders of the matrix."""
        return AdderGraph.of(self.weights)

    @cached_property
    def ranges(self) -> tuple[Ints, Ints]:
        """Smallest and largest accumulator of every output."""
        return accumulator_ranges(self.weights, self.low, self.high)

    def run(self, codes: Ints) -> Ints:
        """(samples, outputs) results of (samples, inputs) codes."""
        out = codes @ self.weights.T
        for at, rescale in enumerate(self.rescales):
            out[:, at] = rescale(out[:, at])
        return out

    @cached_property
    def constant(self) -> NDArray[np.bool_]:
        """(outputs,) True where the result is one code whatever the inputs are."""
        if not self.rescales:
            return np.zeros(len(self.weights), np.bool_)
        ends = np.stack(self.ranges)
        codes = [rescale(ends[:, at]) for at, rescale in enumerate(self.rescales)]
        return np.array([low == high for low, high in codes])

    def without(self, dead_inputs: NDArray[np.bool_], dead_outputs: NDArray[np.bool_]) -> "Circuit":
        """What a synthesizer keeps: no constant inputs, no outputs that nobody reads."""
        if not dead_inputs.any() and not dead_outputs.any():
            return self
        kept = np.flatnonzero(~dead_outputs)
        rescales = tuple(self.rescales[at] for at in kept) if self.rescales else ()
        return Circuit((self.weights * ~dead_inputs)[kept], self.low, self.high, rescales)

    @cached_property
    def features(self) -> Features:
        """What the fitted models know of it."""
        computed, passed = self.graph.adder_bits(self.low, self.high)
        matrix = Features(
            adder_bits=float(computed.sum()),
            carry_bits=float(passed.sum()),
            adders=float(computed.size),
            register_bits=float(
                self.graph.register_bits(self.low, self.high, leaves=not self.rescales)
            ),
            depth=int(self.graph.depth.max(initial=0)),
        )
        if not self.rescales:
            return matrix
        if not len(self.weights):
            return matrix
        depths = self.graph.output_depths.tolist()
        parts = [
            _rescaling(rescale, int(low), int(high), before)
            for rescale, low, high, before in zip(self.rescales, *self.ranges, depths, strict=True)
        ]
        end = max(before + part.depth for before, part in zip(depths, parts, strict=True))
        waits = 0.0
        for rescale, before, part in zip(self.rescales, depths, parts, strict=True):
            stages = _stage(end) - _stage(before + part.depth) + 1
            waits += stages * _bits(rescale.low, rescale.high) if rescale.multiplier else 0
        total_ = reduce(Features.beside, parts)
        return replace(matrix.then(replace(total_, code_register_bits=waits)), depth=end)


def _stage(depth: int) -> int:
    return max(depth - 1, 0) // ADDERS_PER_STAGE


def accumulator_ranges(weights: Ints, low: int, high: int) -> tuple[Ints, Ints]:
    """Smallest and largest sum of every output for inputs between two codes."""
    plus = np.maximum(weights, 0).sum(axis=1)
    minus = np.maximum(-weights, 0).sum(axis=1)
    return plus * low - minus * high, plus * high - minus * low


def _rescaling(rescale: Fixed, low: int, high: int, before: int) -> Features:
    """Multiplier, offset and clamp of one output.

    Args:
        rescale: its constants.
        low: its smallest accumulator.
        high: its largest.
        before: adders on the longest way to the accumulator.
    """
    if rescale.multiplier == 0:
        return Features()
    product = AdderGraph.of(np.array([[rescale.multiplier]]))
    below = low * rescale.multiplier + rescale.offset
    above = high * rescale.multiplier + rescale.offset
    width, depth, offset_bits = _bits(below, above), int(product.depth.max(initial=0)), 0
    if rescale.offset:
        zeros = (rescale.offset & -rescale.offset).bit_length() - 1
        offset_bits = max(width - zeros, 0)
        depth += 1
    code_bits = _bits(rescale.low, rescale.high)
    kept = _bits(below >> rescale.shift, above >> rescale.shift)
    clamps = below >> rescale.shift < rescale.low or above >> rescale.shift > rescale.high
    depth += clamps
    crossed = _stage(before + depth) - _stage(before)
    return Features(
        product_bits=float(product.adder_bits(low, high)[0].sum()),
        offset_bits=float(offset_bits),
        clamp_bits=float(code_bits) if clamps else 0.0,
        excess_bits=float(max(kept - code_bits, 0)) if clamps else 0.0,
        rescale_register_bits=crossed * (width + _bits(low, high)) / 2,
        depth=depth,
    )


def _bits(low: int, high: int) -> int:
    return int(bits_between(np.array([low]), np.array([high]))[0])


def total(parts: Sequence[Features]) -> Features:
    """All parts, one after the other."""
    return reduce(Features.then, parts, Features())
