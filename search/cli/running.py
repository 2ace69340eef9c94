"""What `search run` does once its options are parsed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant_ops.errors import EnvironmentFault, NothingFeasibleError, UsageError
from search.config import RunConfig, read_config
from search.engine import Finished, run_search
from search.progress import ConsoleListener
from search.task import Task

RUNS = Path("runs")
INTERRUPTED = 130
_CHANGEABLE = ("budgets", "max_drop", "trials", "time_limit_s", "bits", "pins", "workers")


def resumed_config(folder: Path, asked: Mapping[str, Any], data: str | None) -> RunConfig:
    """The stored settings of a run with what the user changed."""
    stored, _ = read_config(folder)
    changes = {key: asked[key] for key in _CHANGEABLE if asked[key]}
    for key in ("ray_address", "threads"):
        if asked[key]:
            changes[key] = asked[key]
    if data is not None:
        changes["data"] = data
    return replace(stored, **changes)


def load_task_for(config: RunConfig, listener: ConsoleListener) -> Task:
    """Load the task of a run; a built-in one may have to train its model first."""
    from search.tasks.table import load_task

    listener.on_phase(f"loading task {config.task}")
    data = Path(config.data) if config.data else None
    return load_task(config.task, data=data, progress=listener.on_step)


def execute(config: RunConfig, out: Path | None, *, resume: bool, as_json: bool) -> int:
    """Run, print the front, return the exit code."""
    listener = ConsoleListener(trials=config.trial_limit, time_limit_s=config.time_limit_s)
    with listener:
        task = load_task_for(config, listener)
        folder = out if out is not None else new_folder(task.name)
        finished = run_search(task, config, folder, listener=listener, resume=resume)
    report(finished, config, as_json=as_json)
    if finished.interrupted:
        return INTERRUPTED
    if not finished.front.points:
        raise NothingFeasibleError(
            f"no evaluated candidate meets every budget; the record is kept in {folder}: "
            f"raise --budget or go on with --resume {folder} and more --trials"
        )
    return 0


def new_folder(task_name: str) -> Path:
    """The next free runs/<task>-<number>."""
    number = 1
    while (RUNS / f"{task_name}-{number}").exists():
        number += 1
    return RUNS / f"{task_name}-{number}"


def report(finished: Finished, config: RunConfig, *, as_json: bool) -> None:
    """Print the front on stdout."""
    from search.show import load_shown, print_run

    if as_json:
        print((finished.folder / "front.json").read_text(), end="")
        return
    print_run(load_shown(finished.folder))
    if config.max_drop is not None:
        _report_max_drop(finished, config.max_drop)


def _report_max_drop(finished: Finished, max_drop: float) -> None:
    raise NotImplementedError


__all__ = ["EnvironmentFault", "UsageError", "execute", "json", "load_task_for", "new_folder"]
