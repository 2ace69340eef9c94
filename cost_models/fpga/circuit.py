"""A layer as a circuit: a constant matrix, then a rescaling of every output."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.adders import AdderGraph
from cost_models.fpga.quantizer import Operand, Quantizer, bits, crossed, quantizer
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
        input_bits: of the inputs that are read, registered once and where a stage needs them later.
        register_bits: of sums, held between the stages of the matrix, and its outputs where they
            leave.
        product_register_bits: held in the multipliers of rescalings.
        clamp_register_bits: held between the comparisons of clamps.
        code_register_bits: held until the slowest output is there.
        end_bits: codes registered at the end, where another circuit would register its inputs.
        depth: adders on the longest way.
    """

    adder_bits: float = 0.0
    carry_bits: float = 0.0
    adders: float = 0.0
    product_bits: float = 0.0
    offset_bits: float = 0.0
    clamp_bits: float = 0.0
    excess_bits: float = 0.0
    input_bits: float = 0.0
    register_bits: float = 0.0
    product_register_bits: float = 0.0
    clamp_register_bits: float = 0.0
    code_register_bits: float = 0.0
    end_bits: float = 0.0
    depth: int = 0

    @property
    def registers(self) -> float:
        """Bits of all registers, as they are counted."""
        held = self.input_bits + self.register_bits + self.product_register_bits
        return held + self.clamp_register_bits + self.code_register_bits + self.end_bits

    def times(self, n: int) -> "Features":
        """The same circuit `n` times, side by side."""
        return replace(self, **{name: n * getattr(self, name) for name in SUMS})

    def then(self, other: "Features") -> "Features":
        """Both, one after the other: what lies between is registered where it enters the second."""
        return replace(self._with(other, self.depth + other.depth), end_bits=other.end_bits)

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

    @property
    def input_registers(self) -> Ints:
        """Per input the registers in a row that hold it."""
        return self.graph.input_registers(leaves=not self.rescales)

    @property
    def input_width(self) -> int:
        """Bits of an input."""
        return bits(self.low, self.high)

    @cached_property
    def features(self) -> Features:
        """What the fitted models know of it."""
        graph = self.graph
        computed, passed = graph.adder_bits(self.low, self.high)
        leaves = not self.rescales
        matrix = Features(
            adder_bits=float(computed.sum()),
            carry_bits=float(passed.sum()),
            adders=float(computed.size),
            input_bits=float(self.input_registers.sum() * self.input_width),
            register_bits=float(graph.register_bits(self.low, self.high, leaves=leaves)),
            depth=int(graph.depth.max(initial=0)),
        )
        if not self.rescales or not len(self.weights):
            return matrix
        ends = (*self.ranges, graph.output_depths)
        operands = map(Operand, *(part.tolist() for part in ends))
        parts = [
            quantizer(rescale.narrow, [operand])
            for rescale, operand in zip(self.rescales, operands, strict=True)
        ]
        return replace(matrix.then(of_quantizers(parts)), depth=max(part.depth for part in parts))


def of_quantizers(parts: Sequence[Quantizer]) -> Features:
    """Rescalings side by side whose codes wait for the slowest."""
    end = max(part.depth for part in parts)
    return Features(
        product_bits=float(sum(part.product_bits for part in parts)),
        offset_bits=float(sum(part.offset_bits for part in parts)),
        clamp_bits=float(sum(part.clamp_bits for part in parts)),
        excess_bits=float(sum(part.excess_bits for part in parts)),
        product_register_bits=float(sum(part.product_registers for part in parts)),
        clamp_register_bits=float(sum(part.clamp_registers for part in parts)),
        code_register_bits=float(sum(crossed(p.depth, end) * p.code_bits for p in parts)),
        end_bits=float(sum(part.code_bits for part in parts)),
        depth=end,
    )


def accumulator_ranges(weights: Ints, low: int, high: int) -> tuple[Ints, Ints]:
    """Smallest and largest sum of every output for inputs between two codes."""
    plus = np.maximum(weights, 0).sum(axis=1)
    minus = np.maximum(-weights, 0).sum(axis=1)
    return plus * low - minus * high, plus * high - minus * low


def total(parts: Sequence[Features]) -> Features:
    """All parts, one after the other."""
    return reduce(Features.then, parts, Features())
