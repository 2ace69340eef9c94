"""Keeping libraries from writing into what a command prints."""

import ctypes
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress


@contextmanager
def native_stdout_discarded() -> Iterator[None]:
    """What C code prints inside goes nowhere; results on stdout stay machine-readable.

    HiGHS prints a line of its developers' past every option that silences it. Descriptor 1 is
    one per process, so only for code that runs while nothing else prints.
    """
    try:
        kept = os.dup(1)
    except OSError:  # stdout is closed
        yield
        return
    _flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


@contextmanager
def chatter_discarded() -> Iterator[None]:
    """Warnings logged and texts printed on stderr inside go nowhere; exceptions still come.

    torch.export prints the whole graph before it raises.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _flush() -> None:
    with suppress(AttributeError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):  # no C library by this name on Windows
        ctypes.CDLL(None).fflush(None)
