"""Splits of a task as tensors in memory, cut into batches of the size that evaluates fastest."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from search.task import Batch, Batches

EVALUATION_BATCH = 128


@dataclass(frozen=True, eq=False)
class Split:
    """Batches of one split, in order."""

    batches: tuple[Batch, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # A view is pickled with all of the storage it looks into: every batch with the whole split.
        return Split, (pytree.tree_map(_without_the_rest, self.batches),)

    @property
    def n_samples(self) -> int:
        """Number of samples over all batches."""
        return sum(batch_size(inputs) for inputs, _ in self.batches)

    def inputs(self) -> Iterator[tuple[Tensor, ...]]:
        """The inputs of each batch."""
        for inputs, _ in self.batches:
            yield inputs

    def first(self, n_samples: int) -> "Split":
        """The first `n_samples` samples, whole batches where they cannot be cut."""
        out: list[Batch] = []
        left = n_samples
        for inputs, target in self.batches:
            if left <= 0:
                break
            n = batch_size(inputs)
            if n > left and _is_cuttable(target, n):
                inputs = tuple(x[:left] for x in inputs)
                target = None if target is None else target[:left]
            out.append((inputs, target))
            left -= n
        return Split(tuple(out))

    def cut(self, size: int) -> "Split":
        """Batches of at most `size` samples, where they can be cut."""
        out: list[Batch] = []
        for inputs, target in self.batches:
            n = batch_size(inputs)
            if not _is_cuttable(target, n):
                out.append((inputs, target))
                continue
            for i in range(0, n, size):
                part = None if target is None else target[i : i + size]
                out.append((tuple(x[i : i + size] for x in inputs), part))
        return Split(tuple(out))

    def digest(self) -> str:
        """Identifies the inputs: first and last batch in full, shapes of all."""
        hasher = hashlib.blake2b(digest_size=8)
        for position, (inputs, _) in enumerate(self.batches):
            for x in inputs:
                hasher.update(f"{tuple(x.shape)}{x.dtype}".encode())
                if position in (0, len(self.batches) - 1):
                    hasher.update(x.contiguous().numpy().tobytes())
        return hasher.hexdigest()


def batch_size(inputs: Sequence[Tensor]) -> int:
    """Samples in one batch."""
    return int(inputs[0].shape[0])


def load_split(batches: Batches, *, what: str, batch: int | None = EVALUATION_BATCH) -> Split:
    """Read all batches of a split; merge and cut them to `batch` samples where shapes allow.

    Args:
        batches: as the task gives them.
        what: name of the split, for messages.
        batch: samples per batch; None keeps the task's own batches.

    Raises:
        UsageError: no samples, or a batch that is not (inputs, target).
    """
    read: list[Batch] = []
    for item in batches:
        if not (isinstance(item, Sequence) and len(item) == 2):
            raise UsageError(
                f"the {what} split must give batches of the form (inputs, target), got "
                f"{type(item).__name__}; wrap the inputs of one batch in a tuple"
            )
        inputs, target = item
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        read.append((tuple(channels_last(x) for x in inputs), target))
    if not read or not sum(batch_size(inputs) for inputs, _ in read):
        raise UsageError(
            f"the task has no {what} data: at least one batch is needed, got none; "
            f"give Task.{what} a list of (inputs, target) batches"
        )
    merged = _merge(read) if batch else None
    if merged is None or batch is None:
        return Split(tuple(read))
    inputs, target = merged
    n = batch_size(inputs)
    return Split(
        tuple(
            (
                tuple(x[i : i + batch] for x in inputs),
                None if target is None else target[i : i + batch],
            )
            for i in range(0, n, batch)
        )
    )


def channels_last(x: Tensor) -> Tensor:
    """Images in the memory format in which convolutions are fastest; others as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _without_the_rest(x: Any) -> Any:
    if isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes:
        return x.clone(memory_format=torch.preserve_format)
    return x


def _is_cuttable(target: Any, n: int) -> bool:
    return target is None or (isinstance(target, Tensor) and target.shape[:1] == (n,))


def _merge(batches: Sequence[Batch]) -> Batch | None:
    shapes = {tuple(x.shape[1:] for x in inputs) for inputs, _ in batches}
    if len(shapes) > 1 or not all(_is_cuttable(t, batch_size(i)) for i, t in batches):
        return None
    targets = [target for _, target in batches]
    target = None if any(t is None for t in targets) else torch.cat(targets)
    n_inputs = len(batches[0][0])
    return tuple(torch.cat([inputs[i] for inputs, _ in batches]) for i in range(n_inputs)), target
