"""An additive roofline fitted to measured calls of one kernel, with its error.

time = call + work / throughput + weights / bandwidth + values / bandwidth, every term at least 0;
what the measured calls near a new one deviate from it is interpolated between their sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from cost_models.latency.work import DIMS, Work, conv_macs

Floats = NDArray[np.float64]
_optimize: Any = optimize  # scipy carries no types

BLOCK = 16  # channels a vector kernel computes at once
NEIGHBOURS = 4
FEWEST_SIZES = 3  # to leave one out
ALIGNMENT = 4  # of input channels, for kernels that read several at once
UNALIKE = 100.0  # distance between calls that go to different kernels
LEAST_RESIDENT = 1e5  # bytes of weights


def features(work: Work) -> Floats:
    """What each term of the roofline is proportional to; the first is 1."""
    if work.operator == "conv":
        height, width = work.out_size
        in_channels, out_channels, in_height, in_width = work.dims
        macs, padded = conv_macs(work), conv_macs(work, BLOCK)
        weights = macs / max(1, height * width)
        values = in_channels * in_height * in_width, out_channels * height * width
        ragged = macs if is_ragged(work) else 0
        return np.array([1.0, macs, padded, ragged, weights, *values])
    if work.operator == "linear":
        in_features, out_features, rows = work.dims
        weights = in_features * out_features
        return np.array([1.0, rows * weights, weights, rows * in_features, rows * out_features])
    if work.operator == "copy":
        elements, run = work.dims
        return np.array([1.0, elements, elements / run])
    return np.array([1.0, float(np.prod(work.dims))])


@dataclass(frozen=True, eq=False)
class Roofline:
    """A fit to calls that differ in their sizes only.

    Attributes:
        works: measured calls.
        times: their times.
        resident: bytes of weights of the network that each was measured in.
        coefficients: of `features`.
    """

    works: tuple[Work, ...]
    times: Floats
    resident: Floats
    coefficients: Floats

    @classmethod
    def fit(
        cls, works: Sequence[Work], times: Sequence[float], resident_bytes: Sequence[float] = ()
    ) -> "Roofline":
        """Least squares of the relative error, coefficients not below 0."""
        measured = np.array(times, float)
        resident = np.array(resident_bytes or [0] * len(works), float)
        return cls(tuple(works), measured, resident, _solve(works, measured))

    @cached_property
    def error(self) -> tuple[float, float]:
        """Median and 90th percentile of |predicted / measured - 1|, each size left out in turn.

        NaN where there are fewer than three sizes.
        """
        sizes = list(dict.fromkeys(self.works))
        if len(sizes) < FEWEST_SIZES:
            return float("nan"), float("nan")
        off = []
        for out in sizes:
            left = np.array([work != out for work in self.works])
            rest = [work for work in self.works if work != out]
            partial = Roofline.fit(rest, self.times[left].tolist(), self.resident[left].tolist())
            off += [
                abs(partial.predict(out, float(self.resident[i])) / self.times[i] - 1)
                for i in np.flatnonzero(~left)
            ]
        return float(np.median(off)), float(np.quantile(off, 0.9))

    def predict(self, work: Work, resident_bytes: float = 0) -> float:
        """The time of a call of any size, in a network of so many bytes of weights."""
        distance = np.square(self._sizes - np.log(np.maximum(work.dims, 1))).sum(axis=1)
        if distance.min() == 0:
            return self._between(np.flatnonzero(distance == 0), resident_bytes)
        base = max(float(features(work) @ self.coefficients), 1e-9)
        distance = distance + np.square(self._contexts - _context(resident_bytes))
        distance = distance + UNALIKE * (self._ragged != is_ragged(work))
        near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        weight = 1 / distance[near]
        return base * float(np.exp((weight * self._deviation[near]).sum() / weight.sum()))

    def _between(self, same: NDArray[np.intp], resident_bytes: float) -> float:
        """Between measurements of one size in networks of other sizes."""
        order = same[np.argsort(self._contexts[same])]
        times = np.interp(_context(resident_bytes), self._contexts[order], self.times[order])
        return float(times)

    @cached_property
    def _sizes(self) -> Floats:
        sizes: Floats = np.log(np.maximum([w.dims for w in self.works], 1.0))
        return sizes.reshape(len(self.works), -1)

    @cached_property
    def _contexts(self) -> Floats:
        return np.array([_context(b) for b in self.resident])

    @cached_property
    def _ragged(self) -> NDArray[np.bool_]:
        return np.array([is_ragged(work) for work in self.works])

    @cached_property
    def _deviation(self) -> Floats:
        """Logarithm of measured over fitted."""
        fitted = np.array([features(work) @ self.coefficients for work in self.works])
        out: Floats = np.log(self.times / np.maximum(fitted, 1e-9))
        return out

    def outside(self, work: Work) -> str:
        """Which size lies outside the measured range, in words; "" where none does."""
        known = np.array([w.dims for w in self.works])
        for name, size, low, high in zip(
            DIMS[work.operator], work.dims, known.min(axis=0), known.max(axis=0), strict=True
        ):
            if not low <= size <= high:
                return f"{name} {size} (measured: {low} to {high})"
        return ""


def is_ragged(work: Work) -> bool:
    """Whether a convolution's input channels fit no vector kernel: many, and no multiple of 4."""
    return work.operator == "conv" and work.dims[0] > BLOCK and work.dims[0] % ALIGNMENT != 0


def _context(resident_bytes: float) -> float:
    """Distance between networks of other sizes; far below any cache there is none."""
    return 0.5 * float(np.log(max(resident_bytes, LEAST_RESIDENT)))


def _solve(works: Sequence[Work], times: Floats) -> Floats:
    table = np.array([features(work) for work in works]) / times[:, None]
    scale = np.maximum(table.max(axis=0), 1e-30)
    solution, _ = _optimize.nnls(table / scale, np.ones(len(works)))
    coefficients: Floats = solution / scale
    return coefficients
