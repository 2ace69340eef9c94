"""How often each tap of a kernel meets a real pixel, padding left out."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Pads = Sequence[tuple[int, int]]


def pads_of(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> Pads:
    """Zeros (before, after) along each axis; "same" puts the odd one behind."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if isinstance(padding, str):
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((r // 2, r - r // 2) for r in reach)
    return tuple((p, p) for p in padding)


def tap_counts(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
) -> NDArray[np.int64]:
    """For each tap the number of output positions where it reads a pixel that exists.

    Args:
        sizes: of the input, one per axis of the kernel.
        kernel: its taps along each axis.
        stride: one per axis.
        pads: zeros (before, after) along each axis.
        dilation: one per axis.

    Returns:
        of shape `kernel`.

    >>> tap_counts((4,), (3,), stride=(1,), pads=((1, 1),), dilation=(1,))
    array([3, 4, 3])
    """
    return _counts(tuple(sizes), tuple(kernel), tuple(stride), tuple(pads), tuple(dilation))


@lru_cache(maxsize=1024)
def _counts(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> NDArray[np.int64]:
    counts = np.ones((), np.int64)
    for size, taps, step, (before, after), spread in zip(
        sizes, kernel, stride, pads, dilation, strict=True
    ):
        n_out = (size + before + after - spread * (taps - 1) - 1) // step + 1
        read = np.arange(taps)[:, None] * spread + np.arange(n_out) * step - before
        counts = np.multiply.outer(counts, ((read >= 0) & (read < size)).sum(axis=1))
    return counts
