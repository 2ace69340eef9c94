"""idx files, the format of MNIST and its relatives, compressed by gzip or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quant_ops.errors import EnvironmentFault

_UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str, source: str) -> Path:
    """`name` or `name`.gz in `folder`.

    Raises:
        EnvironmentFault: neither is there; the message says that `source` has them.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise EnvironmentFault(
        f"{folder / name} (or {name}.gz) does not exist; get it from {source} and give the folder "
        f"above with --data or BITFRONT_DATA"
    )


def read_idx(path: Path, n_dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file.

    The format: two zero bytes, the type (0x08), the number of dimensions, each size as a
    big-endian 32-bit integer, then the values.

    Raises:
        EnvironmentFault: cut short, damaged, or not an idx file of `n_dimensions`.
    """
    raw = _content(path)
    if raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, n_dimensions)):
        raise EnvironmentFault(
            f"{path} must be an idx file of unsigned bytes in {n_dimensions} dimensions, but "
            f"begins with {raw[:4].hex(' ') or 'nothing'}; get it again"
        )
    start = 4 + 4 * n_dimensions
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start].ljust(start - 4, b"\0"), ">u4"))
    wanted = start + math.prod(shape)
    if len(raw) != wanted or len(raw) < start:
        raise EnvironmentFault(
            f"{path} must hold {wanted:,} bytes for its shape {shape}, but holds {len(raw):,}; "
            f"get it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise EnvironmentFault(f"{path} is cut short or damaged ({error}); get it again") from error
