"""Calibration data in memory, drawn in random mini-batches, with the values cached beside it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256  # samples at once where nothing is learned

Values = list[Tensor]  # one tensor per chunk


class Samples:
    """Inputs of a network, cut into chunks; values of its nodes are cached chunk by chunk.

    Args:
        batches: (inputs, target) pairs; targets are ignored.
        size: samples of a mini-batch; None keeps the given batches whole, for networks of a
            fixed batch size or inputs of several shapes.

    Raises:
        ValueError: there is no batch.
    """

    def __init__(self, batches: Iterable[tuple[Sequence[Tensor], Any]], size: int | None) -> None:
        read = [tuple(inputs) for inputs, _ in batches]
        if not read:
            raise ValueError("learning needs at least one batch of calibration data")
        shapes = {tuple(x.shape[1:] for x in inputs) for inputs in read}
        self._whole = size is None or len(shapes) > 1
        if not self._whole:
            joined = [torch.cat(parts) for parts in zip(*read, strict=True)]
            read = list(zip(*(torch.split(x, _CHUNK) for x in joined), strict=True))
        self.inputs: list[Values] = [list(parts) for parts in zip(*read, strict=True)]
        self.lengths = [len(inputs[0]) for inputs in read]
        self._size = min(size or 1, sum(self.lengths))

    def map(self, function: Callable[..., Sequence[Any]], *values: Values) -> list[Values]:
        """`function` of each chunk, and its results as values."""
        rows = [function(*parts) for parts in zip(*values, strict=True)]
        # joined outside of inference mode, so that gradients may be taken of functions of them
        return [[part.clone() for part in parts] for parts in zip(*rows, strict=True)]

    def joined(self, values: Values) -> Tensor | Values:
        """Values in the form that `take` is fast on."""
        return values if self._whole else torch.cat(values)

    def take(self, values: Tensor | Values, picked: Tensor) -> Tensor:
        """The values of one mini-batch."""
        return values[int(picked)] if isinstance(values, list) else values[picked]

    @property
    def per_epoch(self) -> int:
        """Whole mini-batches in one epoch."""
        return len(self.lengths) if self._whole else sum(self.lengths) // self._size

    def draw(self, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Which samples each of `steps` mini-batches holds: epoch after epoch, shuffled."""
        n = len(self.lengths) if self._whole else sum(self.lengths)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < self._size:
                order = torch.randperm(n, generator=generator)
            picked, order = order[: self._size], order[self._size :]
            yield picked
