"""The adders of a constant matrix, each with its operands, and their widths for an input range."""

import heapq
from dataclasses import dataclass
from functools import cached_property

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
        first, second, shift: per adder its operands, and by how much the second is shifted left.
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
    plus: Ints
    minus: Ints
    depth: Ints
    outputs: Ints
    output_shift: Ints
    output_sign: Ints

    @classmethod
    def of(cls, weights: NDArray[np.integer]) -> "AdderGraph":
        """The graph of weights @ inputs.

        Args:
            weights: (outputs, inputs) integers.
        """
        return _Builder(np.asarray(weights, np.int64)).build()

    def widths(self, low: int, high: int) -> Ints:
        """Bits of every term when all inputs lie between `low` and `high`."""
        return bits_between(
            self.plus * low - self.minus * high, self.plus * high - self.minus * low
        )

    def adder_bits(self, low: int, high: int) -> Ints:
        """Bits that each adder has to compute: what is below both operands passes through."""
        bits: Ints = np.maximum(self.widths(low, high)[self.n_inputs :] - self.shift, 1)
        return bits

    @cached_property
    def last_read(self) -> Ints:
        """Per term the largest depth of its readers, at least its own."""
        last = self.depth.copy()
        own = self.depth[self.n_inputs :]
        for operands in (self.first, self.second):
            np.maximum.at(last, operands, own - 1)
        used = self.outputs[self.outputs >= 0]
        last[used] = self.depth.max(initial=0)
        return last

    def register_bits(self, low: int, high: int) -> int:
        """Bits held between stages, registers of inputs and outputs included."""
        made = np.maximum(self.depth - 1, 0) // ADDERS_PER_STAGE
        crossings = np.maximum(self.last_read // ADDERS_PER_STAGE - made, 0)
        widths = self.widths(low, high)
        used = self.outputs[self.outputs >= 0]
        return int((crossings * widths).sum() + widths[: self.n_inputs].sum() + widths[used].sum())


def bits_between(low: Ints, high: Ints) -> Ints:
    """Bits of an integer between two bounds, a sign included where it may be negative.

    >>> bits_between(np.array([0, -128, -1, 0]), np.array([255, 127, 1, 0]))
    array([8, 8, 2, 0])
    """
    largest = np.maximum(high, -low - 1)
    magnitude = np.frexp(np.maximum(largest, 0).astype(np.float64))[1].astype(np.int64)
    return magnitude + (low < 0)


class _Builder:
    def __init__(self, weights: Ints) -> None:
        self.n_inputs = weights.shape[1]
        self.shared, self.table = share(signed_digits(weights))
        self.plus, self.minus = [1] * self.n_inputs, [0] * self.n_inputs
        self.depth = [0] * self.n_inputs
        self.first: list[int] = []
        self.second: list[int] = []
        self.shift: list[int] = []

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
