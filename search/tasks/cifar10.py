"""CIFAR-10 with the pretrained ResNet-20 and ResNet-56 [He2016]; images and weights in DATA."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant_ops.errors import EnvironmentFault, UsageError
from search.task import Batch, Preprocessing, Task
from search.tasks.cifar10_files import read_batch
from search.tasks.models import CifarResNet
from search.tasks.training import Progress, ShuffledBatches, in_batches

CHECKPOINTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
CHECKPOINT_SOURCE = "github.com/akamaster/pytorch_resnet_cifar10 (folder pretrained_models)"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the checkpoints were trained with
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
N_CALIBRATION, N_VALIDATION = 1024, 5000


def make_resnet20(
    *, data: Path | None = None, seed: int = 0, progress: Progress | None = None
) -> Task:
    """ResNet-20, 0.27 M parameters, 91.73 % on the test images; see `_make_task`."""
    return _make_task(20, data, seed, progress)


def make_resnet56(
    *, data: Path | None = None, seed: int = 0, progress: Progress | None = None
) -> Task:
    """ResNet-56, 0.85 M parameters, 93.39 % on the test images; see `_make_task`."""
    return _make_task(56, data, seed, progress)


def _make_task(depth: int, data: Path | None, seed: int, progress: Progress | None) -> Task:
    """Calibration is the first 1,024 images of data_batch_1, validation the 5,000 after them.

    The checkpoints were trained on all 50,000 training images, validation among them.

    Args:
        depth: 20 or 56.
        data: folder with the batches and the checkpoint; else BITFRONT_DATA.
        seed: of the order and the augmentation of the training images.
        progress: told of the reading.

    Raises:
        EnvironmentFault: a file is missing or damaged.
        UsageError: the checkpoint is of another architecture.
    """
    name = f"cifar10-resnet{depth}"
    folder = data_folder(data, name)
    model = CifarResNet(depth)
    load_checkpoint(model, _find_checkpoint(folder, CHECKPOINTS[depth]))
    if progress is not None:
        progress("reading CIFAR-10", 0, 1)
    images, labels = _normalised(*read_batch(folder, "data_batch_1"))
    if progress is not None:
        progress("reading CIFAR-10", 1, 1)
    end = N_CALIBRATION + N_VALIDATION
    return Task(
        name=name,
        model=model.eval(),
        calibration=in_batches(images[:N_CALIBRATION], labels[:N_CALIBRATION]),
        validation=in_batches(images[N_CALIBRATION:end], labels[N_CALIBRATION:end]),
        test=lambda: in_batches(*_normalised(*read_batch(folder, "test_batch"))),
        training=_TrainingImages(folder, seed),
        class_names=CLASS_NAMES,
        preprocessing=Preprocessing(MEAN, STD),
        validation_seen_in_training=True,
        # The divergence of a confident model from one that answers "any of the ten".
        worst_loss=math.log(10),
    )


def data_folder(data: Path | None, task_name: str) -> Path:
    """`data` if given, else BITFRONT_DATA.

    Raises:
        EnvironmentFault: neither is given, or it is not a folder.
    """
    chosen = data or (Path(os.environ["BITFRONT_DATA"]) if "BITFRONT_DATA" in os.environ else None)
    if chosen is None:
        raise EnvironmentFault(
            f"task {task_name} reads its data from a folder, but none is given; name it with "
            f"--data DATA or BITFRONT_DATA"
        )
    if not chosen.is_dir():
        raise EnvironmentFault(
            f"the data folder {chosen} does not exist; give another one with --data or "
            f"BITFRONT_DATA"
        )
    return chosen


def _find_checkpoint(folder: Path, name: str) -> Path:
    for path in (folder / "cifar10_resnets" / name, folder / name):
        if path.is_file():
            return path
    raise EnvironmentFault(
        f"the checkpoint {folder / 'cifar10_resnets' / name} does not exist; get {name} from "
        f"{CHECKPOINT_SOURCE}"
    )


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict, bare or under "state_dict", its keys with or without "module.".

    Raises:
        EnvironmentFault: the file is damaged.
        UsageError: it is of another architecture; names the first key that differs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        found = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    except Exception as error:
        # A damaged archive can raise nearly anything.
        reason = str(error).partition("\n")[0]
        raise EnvironmentFault(
            f"the checkpoint {path} cannot be read ({reason}); get it again from "
            f"{CHECKPOINT_SOURCE}"
        ) from error
    difference = _first_difference(model.state_dict(), found)
    if difference:
        raise UsageError(
            f"the checkpoint {path} is of another architecture than {type(model).__name__} as "
            f"wanted here: {difference}; give the checkpoint that belongs to this task"
        )
    model.load_state_dict(found, strict=False)


def _first_difference(wanted: Mapping[str, Tensor], found: Mapping[str, object]) -> str:
    for key, tensor in wanted.items():
        if key.endswith("num_batches_tracked"):  # older checkpoints have none
            continue
        other = found.get(key)
        if not isinstance(other, Tensor):
            return f"{key!r} of shape {tuple(tensor.shape)} is missing"
        if other.shape != tensor.shape:
            return f"{key!r} must have shape {tuple(tensor.shape)}, but has {tuple(other.shape)}"
    extra = [key for key in found if key not in wanted]
    return f"it also holds {extra[0]!r} of shape {_shape(found[extra[0]])}" if extra else ""


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _normalised(
    pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """(pixel / 255 - mean) / std, per channel."""
    images = torch.from_numpy(pixels.copy()).float().div_(255)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return images.sub_(mean).div_(std), torch.from_numpy(labels.copy())


class _TrainingImages:
    """The 43,976 images behind validation, read when the first epoch is asked for."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._epochs: ShuffledBatches | None = None

    def __call__(self) -> Iterator[Batch]:
        return self._all()()

    def epoch(self, number: int) -> Iterator[Batch]:
        """Epoch `number`, whatever was asked for before."""
        return self._all().epoch(number)

    def _all(self) -> ShuffledBatches:
        if self._epochs is None:
            self._epochs = ShuffledBatches(
                *self._read(), batch_size=128, seed=self._seed, augment=shift_and_flip
            )
        return self._epochs

    def _read(self) -> tuple[Tensor, Tensor]:
        parts = [read_batch(self._folder, f"data_batch_{number}") for number in range(1, 6)]
        rest = slice(N_CALIBRATION + N_VALIDATION, None)
        images = np.concatenate([images for images, _ in parts])[rest]
        return _normalised(images, np.concatenate([labels for _, labels in parts])[rest])


def shift_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels and mirror half of the images [He2016, sec. 4.2]."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    rows = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
