"""`search export` and `search verify`: artefacts out, and checked."""

import json
from pathlib import Path
from typing import Annotated

import typer

from search.cli.run_command import DataOption, JsonOption


def register(app: typer.Typer) -> None:
    """Add the subcommands of this file."""
    app.command("export")(export)
    app.command("verify")(verify)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File (packed) or folder.")],
    trial: Annotated[int | None, typer.Option(help="Trial number, as `search show` lists.")] = None,
    best: Annotated[str | None, typer.Option(help="Best point at or under a size: 2MB.")] = None,
    to: Annotated[
        str, typer.Option("--to", help="Deployment target; `search targets` lists them.")
    ] = "packed",
    codec: Annotated[
        str | None,
        typer.Option("--codec", help="Pack anew: plain, or entropy (entropy-coded weights)."),
    ] = None,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            "--arithmetic",
            help="Of --to onnx: runtime (default, fast) or exact (the reference's integers).",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a point whose activations would be calibrated anew."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing export.")] = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write one point of a run's front as an artefact that runs on its own, and prove it."""
    from search.export import export_trial

    report = export_trial(
        run,
        out,
        trial=trial,
        best=best,
        to=to,
        codec=codec,
        arithmetic=arithmetic,
        strict=strict,
        force=force,
        data=data,
    )
    print(json.dumps(report.to_json(), indent=1) if as_json else report.to_text())
    return 0


def verify(
    file: Annotated[Path, typer.Argument(help="A packed file or an exported folder.")],
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Also compare with this task's model.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Also compare code for code with this run.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check an artefact: integrity, its test vectors, and on request the task's metric."""
    from search.verify import verify_file

    report = verify_file(file, task=task, run=run, data=data)
    print(json.dumps(report.to_json(), indent=1) if as_json else report.to_text())
    return 0
