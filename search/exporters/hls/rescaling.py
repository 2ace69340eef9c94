"""Rescalings as layers that hls4ml has: a product, a sum, and a type that rounds and saturates.

clamp(floor(sum * M / 2^n + O / 2^n)) is what assigning an exact fixed-point value to a type with
AP_TRN (floor) and AP_SAT does, wherever the clamp's limits are those of a type. Where they are not,
the value is moved up until the upper limit is that of a signed type, then down until the lower
one is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quant_ops.narrow import NarrowRescale, channel_of, narrowed
from quant_ops.requantize import Integers, Rescale
from search.exporters.hls.fixed import Fixed, clamping, exactly, holding
from search.exporters.hls.network import Inexpressible

Reach = tuple[Integers, Integers]
"""Smallest and largest value of each lane."""
Lane = tuple[NarrowRescale, tuple[int, int]]
"""The rescaling of one lane, and the smallest and largest value before its clamp."""


@dataclass(frozen=True, eq=False)
class Stage:
    """value * scale + offset, assigned to a type; constants and reach are those of each lane."""

    scale: NDArray[np.float64]
    offset: NDArray[np.float64]
    result: Fixed
    reach: Reach


@dataclass(frozen=True, eq=False)
class Lanes:
    """Constants of one rescaling, one entry for each lane of a value.

    Attributes:
        scales: for each source M / 2^n.
        offset: O / 2^n.
        sources: what the sources can be.
        reach: of the floor of the scaled sum, before it is clamped.
        limits: of the clamp, zero point taken off.
    """

    scales: tuple[NDArray[np.float64], ...]
    offset: NDArray[np.float64]
    sources: tuple[Reach, ...]
    reach: Reach
    limits: tuple[int, int]

    def terms(self, first: Stage) -> list[Stage]:
        """Each source times its scale, exact; the first one's offset is that of `first`."""
        offsets = [first.offset, *[np.zeros_like(self.offset)] * (len(self.scales) - 1)]
        found = []
        for scale, offset, (low, high) in zip(self.scales, offsets, self.sources, strict=True):
            ends = np.stack([low * scale + offset, high * scale + offset])
            fraction = max(exactly(scale).fraction, exactly(offset).fraction)
            whole = holding(int(np.floor(ends.min())), int(np.ceil(ends.max())))
            exact = replace(whole, width=whole.width + fraction, fraction=fraction)
            found.append(Stage(scale, offset, exact, (low, high)))
        return found


def lanes_of(rescale: Rescale, channels: Integers, sources: Sequence[Reach], where: str) -> Lanes:
    """The cheapest constants that are equal for all that can occur.

    Args:
        rescale: of the step.
        channels: for each lane which of its constants.
        sources: what each accumulator can be.
        where: name for a refusal.

    Raises:
        Inexpressible: a constant has more digits than a literal of C++ holds.
    """
    known: dict[tuple[int, ...], Lane] = {}  # many lanes of an image that was flattened are equal
    found = []
    for lane, channel in enumerate(channels.tolist()):
        ends = [(int(low[lane]), int(high[lane])) for low, high in sources]
        key = (channel, *chain(*ends))
        if key not in known:
            known[key] = _lane(rescale, channel, ends)
        found.append(known[key])
    narrow, reaches = zip(*found, strict=True)
    if any(int(float(n.offset)) != n.offset for n in narrow):
        raise Inexpressible(where, "has an offset of more than 53 binary digits")
    units = np.array([2.0**-n.shift for n in narrow])
    scales = [np.array([float(n.multipliers[i]) for n in narrow]) for i in range(len(sources))]
    return Lanes(
        tuple(scale * units for scale in scales),
        np.array([float(n.offset) for n in narrow]) * units,
        tuple(sources),
        (np.array([r[0] for r in reaches], np.int64), np.array([r[1] for r in reaches], np.int64)),
        (rescale.low - rescale.zero_point, rescale.high - rescale.zero_point),
    )


def _lane(rescale: Rescale, channel: int, reaches: Sequence[tuple[int, int]]) -> Lane:
    narrow = narrowed(channel_of(rescale, channel), *reaches)
    pairs = zip(narrow.multipliers, reaches, strict=True)
    ends = [sorted((m * low, m * high)) for m, (low, high) in pairs]
    least, most = ((sum(e[i] for e in ends) + narrow.offset) >> narrow.shift for i in (0, 1))
    low, high = narrow.low - narrow.zero_point, narrow.high - narrow.zero_point
    if least >= high or most <= low:  # always saturated, with an offset as large as it can be
        value = high if least >= high else low
        zeros = (0,) * len(narrow.multipliers)
        return replace(narrow, multipliers=zeros, offset=value, shift=0), (value, value)
    return narrow, (least, most)


def stages(lanes: Lanes) -> list[Stage]:
    """What a sum passes through, at most three; the first one scales it."""
    low, high = lanes.limits
    reach = int(lanes.reach[0].min()), int(lanes.reach[1].max())
    clamped = np.clip(lanes.reach[0], low, high), np.clip(lanes.reach[1], low, high)
    scale, one = lanes.scales[0], np.ones_like(lanes.offset)
    direct = clamping(lanes.limits, reach)
    if direct is not None:
        return [Stage(scale, lanes.offset, direct, clamped)]
    width = max(high + 1 - min(reach[0], low), 2).bit_length() + 1
    up = 2 ** (width - 1) - 1 - high
    top = lanes.reach[0] + up, np.minimum(lanes.reach[1], high) + up
    found = [
        Stage(scale, lanes.offset + up, Fixed(width, saturates=True), top),
        Stage(
            one,
            one * -(up + low),
            replace(holding(0, high - low), saturates=True),
            (clamped[0] - low, clamped[1] - low),
        ),
    ]
    if low:
        found.append(Stage(one, one * low, holding(low, high), clamped))
    return found
