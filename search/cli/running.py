"""What `search run` does once its options are parsed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant_ops.errors import NothingFeasibleError
from search.budget import Budgets, format_size
from search.config import RunConfig, read_config
from search.engine import Finished, require_new_folder, require_strategies, run_search
from search.folders import new_folder
from search.latency import latency_model, warn_of_other_device
from search.progress import ConsoleListener
from search.tables import print_front, stdout_console
from search.task import Task

INTERRUPTED = 130
_CHANGEABLE = ("budgets", "max_drop", "trials", "time_limit_s", "bits", "pins", "workers")
_TIMED_STEPS = "finetune.steps"


def resumed_config(folder: Path, asked: Mapping[str, Any], data: str | None) -> RunConfig:
    """The stored settings of a run with what the user changed."""
    stored, _ = read_config(folder)
    changes = {key: asked[key] for key in _CHANGEABLE if asked[key]}
    for key in ("ray_address", "threads"):
        if asked[key]:
            changes[key] = asked[key]
    if asked["finetune_s"] not in (None, stored.finetune_s):
        settings = {k: v for k, v in stored.settings.items() if k != _TIMED_STEPS}
        changes |= {"finetune_s": asked["finetune_s"], "settings": settings}
    if data is not None:
        changes["data"] = data
    return replace(stored, **changes)


def load_task_for(config: RunConfig, listener: ConsoleListener) -> Task:
    """Load the task of a run; a built-in one may have to train its model first."""
    from search.tasks.table import load_task

    listener.on_phase(f"loading task {config.task}")
    data = Path(config.data) if config.data else None
    return load_task(config.task, data=data, progress=listener.on_task)


def execute(config: RunConfig, out: Path | None, *, resume: bool, as_json: bool) -> int:
    """Run, print the front, return the exit code."""
    listener = ConsoleListener(trials=config.trial_limit, time_limit_s=config.time_limit_s)
    with listener:
        # a slip of the pen must not wait for a task to be trained
        Budgets.parse(config.budgets)
        require_strategies(config)
        latency_model(config)
        if out is not None and not resume:
            require_new_folder(out)
        warn_of_other_device(config)
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


def report(finished: Finished, config: RunConfig, *, as_json: bool) -> None:
    """Print the front on stdout."""
    wanted = config.max_drop
    if as_json:
        chosen = None if wanted is None else finished.front.within_drop(wanted).trial
        facts = {"folder": str(finished.folder), "within_max_drop": chosen}
        print(json.dumps({**finished.front.to_json(), **facts}, indent=1))
        return
    console = stdout_console()
    print_front(finished.front, console)
    if wanted is not None:
        point = finished.front.within_drop(wanted)
        console.print(
            f"smallest within {wanted:g} of float: trial {point.trial}, "
            f"{format_size(point.size_bytes)}",
            style="bold",
        )
    console.print(
        f"kept in {finished.folder}: packed models, front.json, front.png, front.html, bits.png",
        highlight=False,
        soft_wrap=True,
    )
