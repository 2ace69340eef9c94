"""Saying what went wrong in code that a user gave, and where."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_ops.errors import BitfrontError, UsageError

MAX_LETTERS = 300
_ROOT = Path(__file__).parent.parent
_TASKS = str(Path(__file__).parent / "tasks")
_OURS = tuple(str(_ROOT / name) for name in ("quant_ops", "cost_models", "search"))


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Any error inside becomes a `UsageError` that begins with `what`.

    Only around code of the user, or of ours on data of the user.
    """
    try:
        yield
    except BitfrontError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {what_and_where(error)}") from error


def what_and_where(error: Exception) -> str:
    """The exception, cut to one sentence, with the line of the user's code nearest to it."""
    text = " ".join(str(error).split())
    if len(text) > MAX_LETTERS:
        text = f"{text[:MAX_LETTERS]}..."
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno} of {error.filename})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    return f"{what} (line {frames[-1].lineno} of {frames[-1].filename})" if frames else what


def _is_users(filename: str) -> bool:
    if filename.startswith(_TASKS) and not filename.endswith("table.py"):
        return True
    is_library = "site-packages" in filename or filename.startswith("<")
    return not is_library and not filename.startswith(_OURS) and "/lib/python" not in filename
