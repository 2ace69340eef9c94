"""Geometry of convolutions and averages, from the arguments of their operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from quant_ops.graph import Arg, Node, Shape
from quant_ops.operators import CONV_TRANSPOSE

Ints = tuple[int, ...]
Span = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Sums over windows of some axes.

    Attributes:
        axes: ascending.
        spans: (start, end) per axis, one entry per output position.
        keep_axes: False: every axis has one window and disappears.
        divisor: by what the sums are divided; broadcasts against the result.
    """

    axes: tuple[int, ...]
    spans: tuple[Span, ...]
    keep_axes: bool
    divisor: NDArray[np.float64]


def windows_of(node: Node, source: Shape) -> Windows | None:
    """Windows of a mean, sum or average pool over values of shape `source`.

    None if the batch is among the reduced axes.
    """
    kind = node.op.partition(".")[0]
    if kind in ("mean", "sum"):
        return _reduction(node, source, divides=kind == "mean")
    if kind.startswith("adaptive"):
        return _adaptive(node, source)
    return _pool(node, source)


def _reduction(node: Node, source: Shape, *, divides: bool) -> Windows | None:
    wanted = node.args[1] if len(node.args) > 1 else None
    if isinstance(wanted, int):
        wanted = (wanted,)
    if not isinstance(wanted, tuple) or not wanted:
        return None
    axes = tuple(sorted(int(a) % len(source) for a in wanted))  # type: ignore[arg-type]
    if 0 in axes:
        return None
    spans = tuple((np.array([0]), np.array([source[a]])) for a in axes)
    count = int(np.prod([source[a] for a in axes])) if divides else 1
    keeps = len(node.args) > 2 and bool(node.args[2])
    return Windows(axes, spans, keeps, np.array(float(count)))


def _adaptive(node: Node, source: Shape) -> Windows:
    wanted = ints(node.args[1])
    axes = tuple(range(len(source) - len(wanted), len(source)))
    spans = []
    for axis, out in zip(axes, wanted, strict=True):
        position, size = np.arange(out), source[axis]
        spans.append((position * size // out, -(-(position + 1) * size // out)))
    return Windows(axes, tuple(spans), True, _outer([end - start for start, end in spans]))


def _pool(node: Node, source: Shape) -> Windows:
    rank = int(node.op[len("avg_pool")])
    given: list[Arg] = [*node.args[1:], *[None] * 6]
    kernel = ints(given[0], rank)
    stride = ints(given[1], rank) if given[1] not in (None, ()) else kernel
    padding = ints(given[2], rank) if given[2] is not None else (0,) * rank
    counts_padding = given[4] is None or bool(given[4])
    axes = tuple(range(len(source) - rank, len(source)))
    spans, counts = [], []
    for axis, k, step, pad in zip(axes, kernel, stride, padding, strict=True):
        begin = np.arange(node.shape[axis]) * step - pad
        end = np.minimum(begin + k, source[axis] + pad)
        span = (np.maximum(begin, 0), np.minimum(end, source[axis]))
        spans.append(span)
        counts.append(end - begin if counts_padding else span[1] - span[0])
    divisor = _outer(counts) if given[5] is None else np.array(float(given[5]))  # type: ignore[arg-type]
    return Windows(axes, tuple(spans), True, divisor)


def _outer(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = reduce(np.multiply.outer, [c.astype(np.float64) for c in counts])
    return product.reshape(-1)[:1].reshape(()) if np.unique(product).size == 1 else product


def ints(arg: Arg, rank: int | None = None) -> tuple[int, ...]:
    """An argument that is one integer or several, repeated to `rank` of them if it is one."""
    values = tuple(int(a) for a in arg) if isinstance(arg, tuple) else (int(arg),)  # type: ignore[arg-type]
    return values * rank if rank is not None and len(values) == 1 else values


def geometry_of(node: Node, kernel: Ints) -> tuple[Ints, tuple[tuple[int, int], ...], Ints, Ints]:
    """Stride, padding (before, after) per axis, dilation, input stride."""
    rank = len(kernel)
    ones = (1,) * rank
    given = [*node.args[3:], *[None] * 5]
    stride = ones if given[0] is None else ints(given[0], rank)
    pad_arg = 0 if given[1] is None else given[1]
    if node.op in CONV_TRANSPOSE:
        pad = ints(pad_arg, rank)
        extra = ints(given[2], rank) if given[2] is not None else (0,) * rank
        dilation = ones if given[4] is None else ints(given[4], rank)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        both = tuple((r - p, r - p + e) for r, p, e in zip(reach, pad, extra, strict=True))
        return ones, both, dilation, stride
    dilation = ones if given[2] is None else ints(given[2], rank)
    if pad_arg == "valid":
        pad_arg = 0
    if pad_arg == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return stride, tuple((r // 2, r - r // 2) for r in reach), dilation, ones
    return stride, tuple((p, p) for p in ints(pad_arg, rank)), dilation, ones
