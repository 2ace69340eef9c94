"""The front of a run: the finished one, or what the record of a killed run holds so far."""

from pathlib import Path

from quant_ops.errors import UsageError
from search.config import read_config
from search.front import ParetoFront


def read_front(folder: Path) -> ParetoFront:
    """The front of the run in `folder`.

    Raises:
        UsageError: the folder holds no run, or one that did not come to its end.
    """
    read_config(folder)
    path = folder / "front.json"
    if not path.exists():
        raise UsageError(
            f"the run in {folder} has not come to its end; finish it with "
            f"`search run --resume {folder}`"
        )
    return ParetoFront.load(path)
