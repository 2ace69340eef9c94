"""Fashion-MNIST [Xiao2017] with a small network trained here once; images in DATA."""

import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from quant_ops.errors import EnvironmentFault
from search.cache import cached_weights
from search.task import Preprocessing, Task
from search.tasks.cifar10 import data_folder
from search.tasks.idx_files import find_idx, read_idx
from search.tasks.models import SmallCNN
from search.tasks.training import (
    Progress,
    ShuffledBatches,
    TrainingRecipe,
    in_batches,
    seeded,
    train_classifier,
)

SOURCE = "github.com/zalandoresearch/fashion-mnist (folder data/fashion)"
RECIPE = TrainingRecipe(epochs=5, learning_rate=0.1, batch_size=128, label_smoothing=0.05)
MEAN, STD = 0.2860, 0.3530  # of the training pixels over 255
CLASS_NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
N_CALIBRATION, N_VALIDATION = 1024, 5000


def make_task(*, data: Path | None = None, seed: int = 0, progress: Progress | None = None) -> Task:
    """Calibration is the first 1,024 training images, validation the 5,000 after them.

    Args:
        data: folder that holds `fashion-mnist/` or the idx files; else BITFRONT_DATA.
        seed: of the initial weights and the training.
        progress: called while the model is trained, which happens once per seed.

    Raises:
        EnvironmentFault: a file is missing or damaged.
    """
    folder = _folder(data_folder(data, "fashion-mnist"))
    images, labels = _read(folder, "train")
    end = N_CALIBRATION + N_VALIDATION
    train = images[end:], labels[end:]
    batches = ShuffledBatches(*train, batch_size=RECIPE.batch_size, seed=seed, augment=mirror_half)
    return Task(
        name="fashion-mnist",
        model=_trained_model(train, seed, progress),
        calibration=in_batches(images[:N_CALIBRATION], labels[:N_CALIBRATION]),
        validation=in_batches(images[N_CALIBRATION:end], labels[N_CALIBRATION:end]),
        test=lambda: in_batches(*_read(folder, "t10k")),
        training=batches,
        class_names=CLASS_NAMES,
        preprocessing=Preprocessing((MEAN,), (STD,)),
        # The divergence of a confident model from one that answers "any of the ten".
        worst_loss=math.log(10),
    )


def _trained_model(train: tuple[Tensor, Tensor], seed: int, progress: Progress | None) -> SmallCNN:
    recipe = {**asdict(RECIPE), "seed": seed, "model": "SmallCNN", "version": 1}
    model = seeded(SmallCNN, seed)

    def make() -> dict[str, Tensor]:
        batches = ShuffledBatches(
            *train, batch_size=RECIPE.batch_size, seed=seed, augment=mirror_half
        )
        what = "training a small CNN on Fashion-MNIST (once)"
        train_classifier(model, batches, RECIPE, progress=progress, what=what)
        return model.state_dict()

    model.load_state_dict(cached_weights("fashion-mnist", recipe, make))
    model.eval()
    return model


def _folder(data: Path) -> Path:
    return data / "fashion-mnist" if (data / "fashion-mnist").is_dir() else data


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) normalised and labels (n,) of "train" or "t10k"."""
    pixels = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte", SOURCE), 3)
    labels = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte", SOURCE), 1)
    wanted = {"train": 60_000, "t10k": 10_000}[part]
    if pixels.shape != (wanted, 28, 28) or labels.shape != (wanted,) or labels.max() > 9:
        raise EnvironmentFault(
            f"{folder} must hold {wanted:,} images of 28x28 with labels 0 to 9 for {part!r}, but "
            f"holds images {pixels.shape} and labels {labels.shape}; get them again from {SOURCE}"
        )
    images = torch.from_numpy(pixels.copy()).float().div_(255).sub_(MEAN).div_(STD)
    return images.unsqueeze(1), torch.from_numpy(labels.astype("int64"))


def mirror_half(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror about half of the images left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)
