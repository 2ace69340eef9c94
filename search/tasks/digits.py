"""Tasks that need no download: ResNet-18 and a small MLP on scikit-learn's handwritten digits."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from search.cache import cached_weights
from search.task import Preprocessing, Task
from search.tasks.models import DigitsMLP, ResNet18
from search.tasks.training import (
    Augment,
    Progress,
    ShuffledBatches,
    TrainingRecipe,
    in_batches,
    seeded,
    train_classifier,
)

RECIPE = TrainingRecipe(epochs=20, learning_rate=0.05, label_smoothing=0.05)
MLP_RECIPE = TrainingRecipe(epochs=60, learning_rate=0.05, label_smoothing=0.05)
# The last stage keeps its 2x2 pixels: on a single pixel a 3x3 kernel has eight dead taps of nine,
# so that most of the 11.2 M weights would be free to drop.
STRIDES = (1, 2, 2, 1)
WHITE = 16  # pixel values are 0 to 16
MEAN, STD = 0.3053, 0.3752  # of the whole data set, pixels over 16
_SPLIT_SEED = 0


def make_task(*, data: Path | None = None, seed: int = 0, progress: Progress | None = None) -> Task:
    """897 images for training and calibration, 300 for validation, 600 for the test.

    Args:
        data: not used; the images come with scikit-learn.
        seed: of the initial weights and the training, not of the split.
        progress: called while the model is trained, which happens once per seed.
    """
    recipe = {**asdict(RECIPE), "seed": seed, "strides": STRIDES, "model": "ResNet18", "version": 1}
    model = seeded(lambda: ResNet18(1, strides=STRIDES), seed)
    return _task("digits", model, RECIPE, recipe, seed, progress, augment=move_a_little)


def make_mlp(*, data: Path | None = None, seed: int = 0, progress: Progress | None = None) -> Task:
    """The images of `make_task` and an MLP that fits an FPGA unrolled.

    Args:
        data: not used; the images come with scikit-learn.
        seed: of the initial weights and the training, not of the split.
        progress: called while the model is trained, which happens once per seed.
    """
    recipe = {**asdict(MLP_RECIPE), "seed": seed, "model": "DigitsMLP", "version": 1}
    return _task("digits-mlp", seeded(DigitsMLP, seed), MLP_RECIPE, recipe, seed, progress)


def _task(
    name: str,
    model: nn.Module,
    recipe: TrainingRecipe,
    key: dict[str, object],
    seed: int,
    progress: Progress | None,
    augment: Augment | None = None,
) -> Task:
    train, validation, test = splits()

    def batches() -> ShuffledBatches:
        return ShuffledBatches(*train, batch_size=recipe.batch_size, seed=seed, augment=augment)

    def make() -> dict[str, Tensor]:
        what = f"training {type(model).__name__} on digits (once)"
        train_classifier(model, batches(), recipe, progress=progress, what=what)
        return model.state_dict()

    model.load_state_dict(cached_weights(name, key, make))
    model.eval()
    return Task(
        name=name,
        model=model,
        calibration=in_batches(*train),
        validation=in_batches(*validation),
        test=lambda: in_batches(*test),
        training=batches(),
        class_names=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing((MEAN * WHITE / 255,), (STD * WHITE / 255,)),
        # The divergence of a confident model from one that answers "any of the ten".
        worst_loss=math.log(10),
    )


def splits() -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test as (images (n, 1, 8, 8), labels (n,)), stratified."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=600, random_state=_SPLIT_SEED, stratify=labels
    )
    train, validation = train_test_split(
        rest, test_size=300, random_state=_SPLIT_SEED, stratify=labels[rest]
    )
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / WHITE
    images = (images - MEAN) / STD
    targets = torch.tensor(labels, dtype=torch.int64)
    return [(images[rows], targets[rows]) for rows in (train, validation, test)]


def move_a_little(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 11 degrees, stretch by up to a tenth, shift by up to 0.8 pixel."""

    def spread(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, width, height = spread(0.2), 1 + spread(0.1), 1 + spread(0.1)
    x_row = torch.stack([angle.cos() * width, -angle.sin() * height, spread(0.2)], dim=1)
    y_row = torch.stack([angle.sin() * width, angle.cos() * height, spread(0.2)], dim=1)
    grid = functional.affine_grid(
        torch.stack([x_row, y_row], dim=1), list(images.shape), align_corners=False
    )
    black = -MEAN / STD  # outside the image is black, which is not 0 once normalised
    return functional.grid_sample(images - black, grid, align_corners=False) + black
