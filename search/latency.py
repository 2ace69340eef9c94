"""Latency tables as a run uses them: found by file or name, loaded, compared with this machine."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import cost_models.latency
from cost_models.latency.backend import BACKENDS, find_backend
from cost_models.latency.model import Latency
from cost_models.latency.table import LatencyTable, load_table, read_table
from quant_ops.errors import BudgetError, EnvironmentFault, UsageError, VerificationError
from search.budget import Budgets
from search.cache import cache_folder
from search.config import RunConfig

log = logging.getLogger(f"bitfront.{__name__}")

SHIPPED = Path(cost_models.latency.__file__).parent.parent / "tables"


def table_folders() -> list[Path]:
    """Where tables are looked for by name: shipped ones, then the user's own."""
    chosen = os.environ.get("BITFRONT_TABLES")
    return [SHIPPED, Path(chosen) if chosen else cache_folder() / "tables"]


def listed_tables() -> Iterator[tuple[Path, LatencyTable | str]]:
    """Every file in the folders, with its table or with what is wrong with it."""
    for folder in table_folders():
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                yield path, read_table(path)
            except (UsageError, VerificationError) as error:
                yield path, str(error)


def find_table(name: str) -> Path:
    """The file that `--latency-table` names: a path, or the name of a listed table.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    for folder in reversed(table_folders()):  # the user's own come first
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = [found.stem for found, _ in listed_tables()]
    raise UsageError(
        f"there is no latency table {name!r}, neither a file (looked in {Path.cwd()}) nor one of "
        f"the listed ones: {', '.join(known)}; measure one with search profile --out {name}"
    )


def table_from_anywhere(name: str | None) -> str | None:
    """The same table, a file named by its whole path, so that a run resumes from any folder."""
    return str(Path(name).resolve()) if name and Path(name).is_file() else name


def latency_model(config: RunConfig) -> Latency | None:
    """The latency model of a run, None where it has no table.

    Raises:
        BudgetError: a latency budget without a table.
        UsageError: no such table, or one that is not complete.
        VerificationError: a file that is no table.
    """
    if config.latency_table is not None:
        table = load_table(find_table(config.latency_table))
        return Latency(table, extrapolate=config.extrapolate)
    if Latency.name in Budgets.parse(config.budgets).limits:
        raise BudgetError(
            "a latency budget needs --latency-table: a file that search profile wrote on the "
            "device, or a name that search tables lists"
        )
    return None


def warn_of_other_device(config: RunConfig) -> None:
    """Say so where the table of a run was measured on another machine than this one."""
    if config.latency_table is None:
        return
    table = read_table(find_table(config.latency_table))
    note = other_device(table)
    if note:
        log.warning("%s", note)


def other_device(table: LatencyTable) -> str:
    """What to know where a table is of another device; "" where it is of this one.

    A table of a backend that does not run here is of another device as a matter of course.
    """
    if table.backend not in BACKENDS:
        return ""
    try:
        backend = find_backend(table.backend)(int(table.device.get("threads", 1)))
    except EnvironmentFault:
        return ""
    here = backend.device()
    if here["fingerprint"] == table.device["fingerprint"]:
        return ""
    return (
        f"latency table {table.name!r} was measured on {table.device['name']}, this machine is "
        f"{here['name']}: latencies are those of the former; measure this machine with search "
        f"profile"
    )
