"""Training batches by position: epoch number and batch within it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from quant_ops.errors import UsageError
from search.task import Batch, Batches, Task


@dataclass(frozen=True, slots=True)
class Position:
    """The next batch to be trained on."""

    epoch: int = 0
    batch: int = 0


class EpochLoader:
    """Endless batches, epoch after epoch, from any position on.

    Epochs are asked for by number where the task's `training` has a method `epoch(number)`;
    otherwise it is called once an epoch with all global random states set from seed and epoch, so
    that a shuffling DataLoader gives the same epoch again.

    Raises:
        UsageError: the task has no training data.
    """

    def __init__(self, task: Task, seed: int) -> None:
        if task.training is None:
            raise UsageError(
                f"task {task.name!r} has no training data, so there is nothing to train on; give "
                f"Task(training=...) a function that returns batches, or use --recover instead"
            )
        self._task, self._make, self._seed = task, task.training, seed

    def batches(self, start: Position) -> Iterator[tuple[Position, Batch]]:
        """Batches with the position after each, from `start` on.

        Raises:
            UsageError: an epoch holds no batch.
        """
        epoch, skip = start.epoch, start.batch
        while True:
            count = 0
            for count, batch in enumerate(self._epoch(epoch), start=1):
                if count > skip:
                    yield Position(epoch, count), batch
            if not count:
                raise UsageError(
                    f"the training data of task {self._task.name!r} hold no batch; give "
                    f"Task(training=...) a function that returns a new iterator at each call"
                )
            epoch, skip = epoch + 1, 0

    def _epoch(self, number: int) -> Batches:
        by_number: Callable[[int], Batches] | None = getattr(self._make, "epoch", None)
        if by_number is not None:
            return by_number(number)
        seed = np.random.SeedSequence([self._seed, number]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        np.random.seed(int(seed))  # noqa: NPY002  a user's augmentation may draw from it
        random.seed(int(seed))
        return self._make()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Global random states are afterwards what they were before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
