"""Files that are either whole or not there."""

import contextlib
import os
from pathlib import Path

from quant_ops.errors import EnvironmentFault


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; what was there stays if anything fails.

    Raises:
        EnvironmentFault: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror or error}; free some space or choose a folder "
            f"that can be written"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, content.encode())
