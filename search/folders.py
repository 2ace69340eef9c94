"""Names of run folders."""

from pathlib import Path

RUNS = Path("runs")


def new_folder(task_name: str) -> Path:
    """The next free runs/<task>-<number>."""
    number = 1
    while (RUNS / f"{task_name}-{number}").exists():
        number += 1
    return RUNS / f"{task_name}-{number}"
