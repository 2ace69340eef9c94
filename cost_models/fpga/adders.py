"""The adders of a constant matrix, each with its operands, and their widths for an input range."""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cost_models.fpga.sharing import share, signed_digits

Ints = NDArray[np.int64]
ADDERS_PER_STAGE = 2  # in a row between two registers


@dataclass(frozen=True, eq=False)
class AdderGraph:
    """Terms: the inputs, then one per adder, in an order in which operands come first.

    Attributes:
        n_inputs: number of inputs.
        first, second, shift, sign: per adder its operands; the second is shifted left by so much,
            and subtracted where the sign is -1.
        plus, minus: per term the sum of its positive coefficients and of the magnitudes of its
            negative ones: with inputs from l to h a term lies between plus l - minus h and
            plus h - minus l.
        depth: per term the adders on the longest way to it.
        outputs: per output its term, -1 if it is always 0.
        output_shift: per output the zeros below its term.
        output_sign: -1 where the output is the negative of its term.
    """

    n_inputs: int
    first: Ints
    second: Ints
    shift: Ints
    sign: Ints
    plus: Ints
    minus: Ints
    depth: Ints
    outputs: Ints
    output_shift: Ints
    output_sign: Ints

    @classmethod
    def of(cls, weights: NDArray[np.integer]) -> "AdderGraph":
        """The graph of weights @ inputs; of a matrix that was met before it is looked up.

        Args:
            weights: (outputs, inputs) integers.
        """
        wide = np.ascontiguousarray(weights, np.int64)
        return _built(wide.shape[0], wide.tobytes())

    def widths(self, low: int, high: int) -> Ints:
        """Bits of every term when all inputs lie between `low` and `high`."""
        return bits_between(
            self.plus * low - self.minus * high, self.plus * high - self.minus * low
        )

    def adder_bits(self, low: int, high: int) -> tuple[Ints, Ints]:
        """Per adder the bits that take a look-up table, and those that the carry passes alone.

        Below both operands nothing is computed. Where they overlap each bit takes a table, and so
        does each bit above the shorter operand if that one is signed, since its sign goes on.
        """
        signed = self.plus * low - self.minus * high < 0
        widths = self.widths(low, high)
        first, second = widths[self.first], widths[self.second] + self.shift
        shorter = np.maximum(np.minimum(first, second), self.shift)
        sign_goes_on = np.where(first < second, signed[self.first], signed[self.second])
        above = np.maximum(widths[self.n_inputs :] - shorter, 0)
        computed: Ints = shorter - self.shift + np.where(sign_goes_on, above, 0)
        passed: Ints = np.where(sign_goes_on, 0, above)
        return computed, passed

    def register_bits(self, low: int, high: int, *, leaves: bool) -> int:
        """Bits of sums that are held between stages, those of the inputs not.

        Args:
            low: smallest input.
            high: largest.
            leaves: the outputs wait for the slowest of them, and are registered once more.
        """
        widths = self.widths(low, high)
        crossings = self._crossings(leaves=leaves)[self.n_inputs :]
        at_end = int(widths[self.outputs[self.outputs >= 0]].sum()) if leaves else 0
        return int(crossings @ widths[self.n_inputs :]) + at_end

    def input_registers(self, *, leaves: bool) -> Ints:
        """Per input the registers in a row that hold it: none where nothing reads it."""
        read = np.zeros(self.n_inputs, np.int64)
        for terms in (self.first, self.second, self.outputs[self.outputs >= 0]):
            read[terms[terms < self.n_inputs]] = 1
        registers: Ints = read + self._crossings(leaves=leaves)[: self.n_inputs]
        return registers

    def _crossings(self, *, leaves: bool) -> Ints:
        """Per term the ends of stages between its adder and the last that reads it."""
        last = np.maximum(self.depth - 1, 0)
        for operands in (self.first, self.second):
            np.maximum.at(last, operands, self.depth[self.n_inputs :] - 1)
        if leaves:
            last[self.outputs[self.outputs >= 0]] = max(int(self.depth.max(initial=0)) - 1, 0)
        crossings: Ints = np.maximum(last // ADDERS_PER_STAGE - stage_of(self.depth), 0)
        return crossings

    @property
    def output_depths(self) -> Ints:
        """Per output the adders on the longest way to it."""
        return np.where(self.outputs >= 0, self.depth[self.outputs], 0)


def stage_of(depth: Ints) -> Ints:
    """The stage in which a term of some depth is made; inputs come with the first."""
    return np.maximum(depth - 1, 0) // ADDERS_PER_STAGE


def bits_between(low: Ints, high: Ints) -> Ints:
    """Bits of an integer between two bounds, a sign included where it may be negative.

    >>> bits_between(np.array([0, -128, -1, 0]), np.array([255, 127, 1, 0]))
    array([8, 8, 2, 0])
    """
    largest = np.maximum(high, -low - 1)
    magnitude = np.frexp(np.maximum(largest, 0).astype(np.float64))[1].astype(np.int64)
    return magnitude + (low < 0)


@lru_cache(maxsize=8192)
def _built(n_outputs: int, weights: bytes) -> AdderGraph:
    return _Builder(np.frombuffer(weights, np.int64).reshape(n_outputs, -1)).build()


class _Builder:
    def __init__(self, weights: Ints) -> None:
        self.n_inputs = weights.shape[1]
        self.shared, self.table = share(signed_digits(weights))
        self.plus, self.minus = [1] * self.n_inputs, [0] * self.n_inputs
        self.depth = [0] * self.n_inputs
        self.first: list[int] = []
        self.second: list[int] = []
        self.shift: list[int] = []
        self.sign: list[int] = []

    def build(self) -> AdderGraph:
        for sum_ in self.shared:
            self._add(sum_.first, sum_.second, sum_.shift, sum_.sign)
        outputs = [self._output(row) for row in self.table]
        terms, shifts, signs = np.array(outputs, np.int64).reshape(-1, 3).T
        return AdderGraph(
            self.n_inputs,
            np.array(self.first, np.int64),
            np.array(self.second, np.int64),
            np.array(self.shift, np.int64),
            np.array(self.sign, np.int64),
            np.array(self.plus, np.int64),
            np.array(self.minus, np.int64),
            np.array(self.depth, np.int64),
            terms,
            shifts,
            signs,
        )

    def _add(self, first: int, second: int, shift: int, sign: int) -> int:
        more, less = self.plus[second], self.minus[second]
        if sign < 0:
            more, less = less, more
        self.plus.append(self.plus[first] + (more << shift))
        self.minus.append(self.minus[first] + (less << shift))
        self.depth.append(1 + max(self.depth[first], self.depth[second]))
        self.first.append(first)
        self.second.append(second)
        self.shift.append(shift)
        self.sign.append(sign)
        return len(self.plus) - 1

    def _output(self, row: NDArray[np.int8]) -> tuple[int, int, int]:
        """Add up what is left of one output, shallow and narrow terms first."""
        terms, shifts = np.nonzero(row)
        if not terms.size:
            return -1, 0, 1
        heap = [
            self._entry(int(t), int(s), int(row[t, s])) for t, s in zip(terms, shifts, strict=True)
        ]
        heapq.heapify(heap)
        while len(heap) > 1:
            one, two = heapq.heappop(heap), heapq.heappop(heap)
            low, high = sorted((one[2:], two[2:]), key=lambda item: (item[0], -item[2]))
            term = self._add(low[1], high[1], high[0] - low[0], low[2] * high[2])
            heapq.heappush(heap, self._entry(term, low[0], low[2]))
        _, _, shift, term, sign = heap[0]
        return term, shift, sign

    def _entry(self, term: int, shift: int, sign: int) -> tuple[int, int, int, int, int]:
        size = (self.plus[term] + self.minus[term]) << shift
        return self.depth[term], size, shift, term, sign
