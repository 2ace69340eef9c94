"""The front of a run: the finished one, or what the record of an unfinished run holds so far."""

from pathlib import Path

from quant_ops.errors import UsageError
from search.config import read_config
from search.front import FrontInfo, ParetoFront
from search.record import JOURNAL, Record

FRONT = "front.json"


def write_unfinished(folder: Path, info: FrontInfo) -> None:
    """Say what the run is about, so that its front can be shown before it ends."""
    ParetoFront(info, ()).save(folder / FRONT)


def read_front(folder: Path) -> ParetoFront:
    """The front of the run in `folder`.

    Of a run that was stopped: the points so far, judged on the search samples, not packed yet.

    Raises:
        UsageError: the folder holds no run, or one that was stopped before its first trial.
    """
    config, _ = read_config(folder)
    path = folder / FRONT
    if not path.exists():
        raise UsageError(
            f"the run in {folder} was stopped before it measured anything; go on with "
            f"`search run --resume {folder}`"
        )
    front = ParetoFront.load(path)
    if front.points or not ((folder / JOURNAL).exists() or config.storage):
        return front
    return ParetoFront.of(Record.open(folder, storage=config.storage).evaluations(), front.info)
