"""Which operators take the largest or smallest of a window, and of which windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_ops.windows import Span


@dataclass(frozen=True, slots=True, eq=False)
class Extreme:
    """A maximum or minimum over windows.

    Attributes:
        kind: max or min.
        windows: axis (0 is the first after the batch) to (start, end) per output position.
        steps: axis to the distance of the positions in a window.
        counts: sizes of the result, reduced axes kept.
        keeps: False: the axes in `windows` disappear.
    """

    kind: str
    windows: Mapping[int, Span]
    steps: Mapping[int, int]
    counts: tuple[int, ...]
    keeps: bool


def windows_of_maximum(
    op: str, args: Sequence[Any], sizes: Sequence[int], out_sizes: Sequence[int]
) -> Extreme | None:
    """The windows of `op` over a value of `sizes` (no batch), None for another operator."""
    kind = op.partition(".")[0]
    if kind in ("amax", "amin", "max", "min"):
        return _reduction(kind[-3:], args, sizes)
    if kind.startswith("adaptive_max_pool"):
        return _adaptive(args, sizes)
    if kind.startswith("max_pool"):
        return _pool(int(kind[len("max_pool")]), args, sizes, out_sizes)
    return None


def _reduction(kind: str, args: Sequence[Any], sizes: Sequence[int]) -> Extreme:
    given = args[0] if args else ()
    wanted = [given] if isinstance(given, int) else list(given)
    rank = len(sizes) + 1
    axes = sorted(a % rank - 1 for a in wanted) or list(range(len(sizes)))
    windows = {a: (np.array([0]), np.array([sizes[a]])) for a in axes}
    counts = tuple(1 if a in windows else n for a, n in enumerate(sizes))
    keeps = len(args) > 1 and bool(args[1])
    return Extreme(kind, windows, dict.fromkeys(windows, 1), counts, keeps)


def _adaptive(args: Sequence[Any], sizes: Sequence[int]) -> Extreme:
    wanted = args[0] if isinstance(args[0], list | tuple) else [args[0]]
    first = len(sizes) - len(wanted)
    windows, counts = {}, list(sizes)
    for axis, out in enumerate(wanted, start=first):
        position, size = np.arange(out), sizes[axis]
        windows[axis] = (position * size // out, -(-(position + 1) * size // out))
        counts[axis] = out
    return Extreme("max", windows, dict.fromkeys(windows, 1), tuple(counts), True)


def _pool(rank: int, args: Sequence[Any], sizes: Sequence[int], out: Sequence[int]) -> Extreme:
    given = [*args, *[None] * 5]
    kernel = _repeated(given[0], rank)
    stride = _repeated(given[1], rank) if given[1] not in (None, [], ()) else kernel
    padding = _repeated(0 if given[2] is None else given[2], rank)
    dilation = _repeated(1 if given[3] is None else given[3], rank)
    first = len(sizes) - rank
    windows, steps = {}, {}
    for at in range(rank):
        axis, step = first + at, dilation[at]
        begin = np.arange(out[axis]) * stride[at] - padding[at]
        end = np.minimum(begin + step * (kernel[at] - 1) + 1, sizes[axis])
        inside = begin + np.maximum(0, -(begin // step)) * step
        windows[axis] = (np.where(begin < 0, inside, begin), end)
        steps[axis] = step
    return Extreme("max", windows, steps, tuple(out), True)


def _repeated(value: Any, rank: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * rank if len(values) == 1 else values
