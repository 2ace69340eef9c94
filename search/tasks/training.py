"""A small float training loop for the built-in tasks that bring no checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from search.task import Batch

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as (what is being done, steps done, steps in all)."""

Model = TypeVar("Model", bound=nn.Module)
Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class TrainingRecipe:
    """All that decides the weights besides model and data; its fields key the cache.

    Attributes:
        learning_rate: the peak of a one-cycle schedule [Smith2018].
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
    """

    epochs: int
    learning_rate: float
    optimizer: str = "sgd"
    batch_size: int = 64
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warm_up: float = 0.3
    seed: int = 0


def in_batches(images: Tensor, labels: Tensor, batch_size: int = 250) -> list[Batch]:
    """The split in order; every batch is a view of the one big tensor."""
    return [
        ((x,), y)
        for x, y in zip(_split(images, batch_size), _split(labels, batch_size), strict=True)
    ]


def _split(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    return torch.split(rows, batch_size)


class ShuffledBatches:
    """Gives one epoch per call, each in its own order and with its own augmentation.

    Epoch n is a function of (seed, n) alone. An incomplete last batch is left out, since batch
    norm cannot be trained on a handful of images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
    ) -> None:
        self._images, self._labels = images, labels
        self._batch_size, self._seed, self._augment = batch_size, seed, augment
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._images) // self._batch_size

    def __call__(self) -> Iterator[Batch]:
        self._epoch += 1
        return self.epoch(self._epoch - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Epoch `number`, whatever was asked for before."""
        return self._one_epoch(torch.Generator().manual_seed(self._seed * 1_000_003 + number))

    def _one_epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(self._images), generator=generator)
        for rows in _split(order[: len(self) * self._batch_size], self._batch_size):
            images = self._images[rows]
            if self._augment is not None:
                images = self._augment(images, generator)
            yield (images,), self._labels[rows]


def seeded(make: Callable[[], Model], seed: int) -> Model:
    """The module with initial weights that depend on `seed` alone; global state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train_classifier(
    model: nn.Module,
    batches: ShuffledBatches,
    recipe: TrainingRecipe,
    *,
    progress: Progress | None = None,
    what: str = "training",
) -> None:
    """Train in place by cross-entropy; ends in evaluation mode.

    The same weights come out under one seed, thread count and build of torch.
    """
    n_steps = recipe.epochs * len(batches)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, n_steps, pct_start=recipe.warm_up
    )
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        for (images,), labels in batches():
            optimizer.zero_grad()
            loss = functional.cross_entropy(
                model(images), labels, label_smoothing=recipe.label_smoothing
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            if progress is not None:
                progress(what, step, n_steps)
    model.eval()


def _optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.learning_rate, momentum=0.9, nesterov=True)
    assert recipe.optimizer == "adamw"
    return torch.optim.AdamW(groups, recipe.learning_rate)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Share of samples whose largest logit is the label's."""
    hits = [(model(*inputs).argmax(dim=1) == target).double() for inputs, target in batches]
    return float(torch.cat(hits).mean())
