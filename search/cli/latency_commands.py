"""`search profile` and `search tables`: latency tables measured, checked and listed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from search.cli.run_command import DataOption, ExtrapolateOption, JsonOption, LatencyTableOption


def register(app: typer.Typer) -> None:
    """Add the subcommands of this file."""
    app.command("profile")(profile)
    app.command("tables")(tables)


def profile(
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Whose layer shapes to measure.")
    ] = None,
    data: DataOption = None,
    backend: Annotated[str, typer.Option(help="Whose kernels.")] = "onnxruntime",
    out: Annotated[Path | None, typer.Option(help="File of the table.")] = None,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="A grid of sizes that serves many networks.")
    ] = False,
    pruned: Annotated[
        bool, typer.Option(help="Also the shapes that are left when channels are removed.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measuring.")] = 12,
    passes: Annotated[int, typer.Option(min=1, help="Runs of every call in a round.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a kernel.")] = 1,
    check: Annotated[
        Path | None,
        typer.Option(help="Folder of a run: time its finished networks as a whole instead."),
    ] = None,
    latency_table: LatencyTableOption = None,
    extrapolate: ExtrapolateOption = False,
    as_json: JsonOption = False,
) -> int:
    """Measure this machine's kernels for a task's shapes; --check times whole networks.

    An interrupted measurement goes on with the same command. A table that is complete is
    extended by the shapes of another task.
    """
    from cost_models.latency.backend import find_backend
    from quant_ops.errors import UsageError

    chosen = find_backend(backend)
    if check is not None:
        return _check(check, latency_table, chosen, data, extrapolate, as_json)
    if out is None:
        raise UsageError("search profile needs --out FILE for the table, or --check RUN")
    if (task is None) != shapes:
        raise UsageError("search profile measures the shapes of --task T, or a grid with --shapes")
    from cost_models.latency.measure import Plan
    from search.cli.running import load_task_for
    from search.config import RunConfig
    from search.latency_tables import print_profile
    from search.profiling import profile as measure
    from search.progress import ConsoleListener
    from search.tables import stdout_console

    ready = chosen(threads)  # a device that is missing is missed before a task is loaded
    with ConsoleListener() as listener:
        loaded = None
        if task is not None:
            loaded = load_task_for(RunConfig(task=task, data=data), listener)
        table = measure(
            ready,
            loaded,
            out,
            plan=Plan(rounds, passes),
            pruned=pruned,
            listener=listener,
        )
    if as_json:
        print(json.dumps(table.to_json(), indent=1))
    else:
        print_profile(table, out, stdout_console())
    return 0


def _check(
    run: Path,
    latency_table: str | None,
    backend: type,
    data: str | None,
    extrapolate: bool,
    as_json: bool,
) -> int:
    from quant_ops.errors import UsageError
    from search.cli.running import load_task_for
    from search.config import read_config
    from search.latency_tables import checks_to_dict, print_checks
    from search.profiling import check_run, device_note
    from search.progress import ConsoleListener
    from search.tables import stdout_console

    config, _ = read_config(run)
    name = latency_table or config.latency_table
    if name is None:
        raise UsageError(
            f"the run in {run} has no latency table; name one with --latency-table, as search "
            f"tables lists or search profile wrote"
        )
    note = device_note(name)
    with ConsoleListener() as listener:
        if data is not None:
            from dataclasses import replace

            config = replace(config, data=data)
        checks = check_run(
            run,
            name,
            backend,
            task=load_task_for(config, listener),
            extrapolate=extrapolate,
            listener=listener,
        )
    if as_json:
        print(json.dumps(checks_to_dict(checks), indent=1))
        return 0
    if note:
        stdout_console().print(note, style="yellow", highlight=False, soft_wrap=True)
    print_checks(checks, stdout_console())
    return 0


def tables(as_json: JsonOption = False) -> int:
    """List the latency tables: shipped ones, and your own in $BITFRONT_TABLES or the cache."""
    from cost_models.latency.table import LatencyTable
    from search.latency import listed_tables, table_folders
    from search.latency_tables import print_listed, table_row
    from search.tables import stdout_console

    rows = [
        table_row(path, found)
        if isinstance(found, LatencyTable)
        else {"name": path.stem, "error": found, "path": str(path)}
        for path, found in listed_tables()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    print_listed(rows, stdout_console())
    print(f"your own tables: put files into {table_folders()[-1]}")
    return 0
