"""Optuna's journal file, made safe against a killed writer."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from quant_ops.errors import EnvironmentFault


class KernelLock(JournalFileOpenLock):
    """A lock that the kernel releases when its holder dies.

    Optuna's own locks are files beside the journal that outlive a killed process by 30 seconds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, which is on the journal itself."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except OSError:  # a run on a read-only disk can still be shown
            descriptor = os.open(self._path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let the next one in."""
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None


class _Backend(JournalFileBackend):
    """Says in one sentence that the disk is full."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lock_obj=KernelLock(path))
        self._journal = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with writing(self._journal):
            super().append_logs(logs)


def open_journal(path: Path) -> JournalStorage:
    """The storage in `path`, which is made if missing and repaired if a writer was killed.

    Raises:
        EnvironmentFault: the file cannot be read or written, or is damaged before its end.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            drop_unfinished_tail(path)
        try:
            return JournalStorage(_Backend(path))
        except (ValueError, KeyError) as error:
            raise EnvironmentFault(
                f"{path} is damaged before its last line ({error}); restore it from a copy, or "
                f"start a new run with another --out"
            ) from error


def drop_unfinished_tail(path: Path) -> int:
    """Cut off what a killed writer left behind the last whole line; gives the bytes dropped.

    What is dropped is kept in `<path>.dropped`. A live writer is waited for.
    """
    lock = KernelLock(path)
    lock.acquire()
    try:
        keep = _whole_lines(path)
        size = path.stat().st_size
        if keep == size:
            return 0
        with path.open("r+b") as file:
            file.seek(keep)
            tail = file.read()
            with path.with_name(path.name + ".dropped").open("ab") as dropped:
                dropped.write(tail + b"\n")
            file.truncate(keep)
            file.flush()
            os.fsync(file.fileno())
        return size - keep
    finally:
        lock.release()


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is complete and parses."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            json.loads(content[start:end])
            return end
        except ValueError:
            end = start
    return 0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure of the file system into one sentence about the record."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the record {path}: {error.strerror or error}; free some space or "
            f"choose a folder that can be written, then go on with --resume"
        ) from error
