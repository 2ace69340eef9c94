"""CIFAR-10 as people have it: the binary batches or the Python batches."""

import io
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from quant_ops.errors import EnvironmentFault

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]

N_PER_BATCH = 10_000
_PIXELS = 3 * 32 * 32
_BINARY, _PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
SOURCE = (
    "the CIFAR-10 page of the University of Toronto (cifar-10-binary.tar.gz or "
    "cifar-10-python.tar.gz)"
)


def read_batch(folder: Path, name: str) -> Arrays:
    """One of data_batch_1..5 or test_batch: images (10000, 3, 32, 32) and labels (10000,).

    Args:
        folder: holds `cifar-10-batches-bin/`, `cifar-10-batches-py/`, or the files themselves.
        name: without an ending.

    Raises:
        EnvironmentFault: the file is missing or damaged.
    """
    for path in (folder / _BINARY / f"{name}.bin", folder / f"{name}.bin"):
        if path.is_file():
            return _read_binary(path)
    for path in (folder / _PYTHON / name, folder / name):
        if path.is_file():
            return _read_python(path)
    raise EnvironmentFault(
        f"CIFAR-10's {name} is in neither {folder / _BINARY} nor {folder / _PYTHON}; unpack "
        f"{SOURCE} into {folder}"
    )


def _read_binary(path: Path) -> Arrays:
    """Per image one byte of label, then 1024 red, green and blue bytes each, row by row."""
    raw = np.fromfile(path, np.uint8)
    wanted = N_PER_BATCH * (1 + _PIXELS)
    if raw.size != wanted:
        raise EnvironmentFault(
            f"{path} must hold {wanted:,} bytes, but holds {raw.size:,}; get it again from {SOURCE}"
        )
    rows = raw.reshape(N_PER_BATCH, 1 + _PIXELS)
    return _checked(path, rows[:, 1:], rows[:, 0].astype(np.int64))


def _read_python(path: Path) -> Arrays:
    try:
        batch = _InertUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = _pixels(batch[b"data"]), np.asarray(batch[b"labels"], np.int64)
    except Exception as error:
        # A damaged pickle can raise nearly anything.
        reason = " ".join(str(error).split())
        raise EnvironmentFault(
            f"{path} is not a Python batch of CIFAR-10 ({reason}); get it again from {SOURCE}"
        ) from error
    return _checked(path, images, labels)


def _checked(path: Path, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Arrays:
    if labels.shape != (N_PER_BATCH,) or labels.min() < 0 or labels.max() > 9:
        raise EnvironmentFault(
            f"{path} must hold {N_PER_BATCH:,} labels from 0 to 9, but holds {labels.size:,} from "
            f"{labels.min(initial=0)} to {labels.max(initial=0)}; get it again from {SOURCE}"
        )
    return pixels.reshape(-1, 3, 32, 32), labels


class _Inert:
    """Stands for a numpy array or its type: keeps what the pickle says of it and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: tuple[object, ...] = ()

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Reads containers, numbers and strings; nothing that a pickle names is imported or called."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is never loaded")


def _pixels(array: object) -> npt.NDArray[np.uint8]:
    """An inert array of bytes, shape (10000, 3072), as numpy stores its state."""
    if not isinstance(array, _Inert) or len(array.state) != 5:
        raise ValueError("its images are not a numpy array")
    _, shape, dtype, fortran_order, raw = array.state
    kind = dtype.arguments[:1] if isinstance(dtype, _Inert) else ()
    if kind not in (("u1",), (b"u1",)) or not isinstance(raw, bytes):
        raise ValueError("its images are not unsigned bytes")
    if shape != (N_PER_BATCH, _PIXELS) or len(raw) != N_PER_BATCH * _PIXELS:
        raise ValueError(f"its images have the shape {shape}")
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    return np.frombuffer(raw, np.uint8).reshape((N_PER_BATCH, _PIXELS), order=order)
