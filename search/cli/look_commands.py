"""Subcommands that look at runs and list what there is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from search.cli.run_command import DataOption, JsonOption

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]


def register(app: typer.Typer) -> None:
    """Add the subcommands of this file."""
    for command in (show, report, compare, dashboard, tasks, strategies, targets):
        app.command(command.__name__)(command)


def show(run: RunArgument, as_json: JsonOption = False) -> int:
    """The front as a table, with the uniform and rate-distortion baselines beside it."""
    from search.show import print_run, read_run

    shown = read_run(run)
    if as_json:
        print(json.dumps(shown.content, indent=1))
    else:
        print_run(shown)
    return 0


def report(
    run: RunArgument,
    test: Annotated[bool, typer.Option("--test", help="Read the test split, once.")] = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> int:
    """The front with the metric on the test split, which nothing else reads."""
    from search.report import read_test_split
    from search.show import print_run, read_run

    if test:
        read_test_split(run, data=data)
    shown = read_run(run)
    if as_json:
        print(json.dumps(shown.content, indent=1))
    else:
        print_run(shown)
    return 0


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
    as_json: JsonOption = False,
) -> int:
    """Two runs side by side: best point at equal sizes, hypervolumes on common constants."""
    from search.show import compare_runs

    comparison = compare_runs(first, second)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=1))
    else:
        comparison.print()
    return 0


def dashboard(
    run: RunArgument,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Loopback unless told otherwise.")] = "127.0.0.1",
) -> int:
    """Serve optuna-dashboard on the run's record."""
    from search.dashboard import serve

    serve(run, port=port, host=host)
    return 0


def tasks() -> int:
    """List the built-in tasks."""
    from search.tasks.table import describe_tasks

    for name, summary in describe_tasks():
        print(f"{name:18} {summary}")
    return 0


def strategies(as_json: JsonOption = False) -> int:
    """The capability table of the search methods."""
    from search.strategies.table import capability_table
    from search.tables import print_capabilities

    rows = capability_table()
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        print_capabilities(rows)
    return 0


def targets() -> int:
    """List the deployment targets and what they can run."""
    from search.targets import TARGETS

    for target in TARGETS.values():
        print(f"{target.name:14} {target.summary}")
    return 0
