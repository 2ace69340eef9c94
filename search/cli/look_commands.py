"""Subcommands that look at runs and list what there is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli.run_command import DataOption, DeviceOption, FinetuneOption, JsonOption

if TYPE_CHECKING:
    from search.front import ParetoFront
    from search.prediction import PredictionReport

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.")]


def register(app: typer.Typer) -> None:
    """Add the subcommands of this file."""
    for command in (show, report, recover, fpga, compare, dashboard, tasks, strategies, targets):
        app.command(command.__name__)(command)


def show(
    run: RunArgument,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Explain one trial: sparsity, widths, ranking.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """The front as a table, with the uniform and rate-distortion baselines beside it."""
    from search.fpga import print_fpga
    from search.prediction import prediction_report
    from search.show import read_front
    from search.tables import stdout_console

    if trial is not None:
        return _explain(run, trial, as_json=as_json)
    front = read_front(run)
    _print(front, as_json=as_json)
    if not as_json:
        print_fpga(front, run, stdout_console())
        _print_prediction(prediction_report(run))
        _print_latency(run)
    return 0


def fpga(
    run: RunArgument,
    trial: Annotated[
        list[int] | None,
        typer.Option("--trial", help="Points to measure; by default the three largest."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Synthesize finalists with da4ml and yosys, and compare with the fitted model."""
    from dataclasses import asdict

    from search.fpga import measure_finalists, print_measured
    from search.progress import ConsoleListener
    from search.tables import stdout_console

    with ConsoleListener() as listener:
        rows = measure_finalists(run, trial or (), tell=listener.on_phase)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_measured(rows, stdout_console())
    return 0


def report(
    run: RunArgument,
    test: Annotated[bool, typer.Option("--test", help="Read the test split, once.")] = False,
    trials: Annotated[
        list[int] | None,
        typer.Option("--trial", help="With --test: of this point alone. Repeatable."),
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> int:
    """The front, what recovery gained, how good predictions were; --test reads the test split."""
    from quant_ops.errors import UsageError
    from search.latency_tables import checks_to_dict
    from search.prediction import prediction_report
    from search.profiling import latency_checks
    from search.recovery_run import recoveries
    from search.recovery_tables import print_recoveries, recovery_to_dict
    from search.report import read_test_split
    from search.show import read_front
    from search.tables import front_to_dict, print_front, stdout_console

    if trials and not test:
        raise UsageError("--trial says which points --test reads; give --test, too")
    front = read_test_split(run, data=data, trials=trials or None) if test else read_front(run)
    found, prediction = recoveries(run, front), prediction_report(run)
    if as_json:
        recovered = [recovery_to_dict(e, steps) for e, steps in found]
        predicted = None if prediction is None else prediction.to_json()
        latency = checks_to_dict(latency_checks(run))
        facts = {"recovery": recovered, "prediction": predicted, "latency": latency}
        print(json.dumps({**front_to_dict(front), **facts}, indent=1))
    else:
        print_front(front, stdout_console())
        print_recoveries(found, stdout_console())
        _print_prediction(prediction)
        _print_latency(run)
    return 0


def recover(
    run: RunArgument,
    trial: Annotated[int, typer.Option("--trial", help="Number, as `search show` lists.")],
    level: Annotated[
        str, typer.Option("--recover", help="fast (second-order rounding) or full (also learned).")
    ] = "full",
    finetune: FinetuneOption = None,
    device: DeviceOption = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="finetune.KEY=VALUE. Repeatable.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> int:
    """Better weights for one trial, as a new trial: from calibration inputs, or by training."""
    if finetune is not None or settings:
        return _finetune(run, trial, finetune, device, settings or [], data, as_json)
    from search.recovery_run import recover_trial
    from search.recovery_tables import print_recovery, recovery_to_dict
    from search.tables import stdout_console

    evaluation, steps = recover_trial(run, trial, level, data=data)
    if as_json:
        print(json.dumps(recovery_to_dict(evaluation, steps), indent=1))
    else:
        print_recovery(evaluation, steps, stdout_console())
    return 0


def _finetune(
    run: Path,
    trial: int,
    duration: str | None,
    device: str,
    settings: list[str],
    data: str | None,
    as_json: bool,
) -> int:
    from search.durations import parse_duration
    from search.point_row import point_row
    from search.progress import ConsoleListener
    from search.show import read_front
    from search.strategies.table import parse_settings
    from search.tables import stdout_console
    from search.training.finetune import finetune_trial

    texts = parse_settings(settings)
    with ConsoleListener() as listener:
        evaluation = finetune_trial(
            run,
            trial,
            seconds=parse_duration(duration) if duration else None,
            device=device,
            settings={f"{n}.{k}": v for n, own in texts.items() for k, v in own.items()},
            data=data,
            listener=listener,
        )
    row = point_row(read_front(run), evaluation)
    if as_json:
        print(json.dumps(row, indent=1))
    else:
        stdout_console().print(
            f"trial {evaluation.trial}, trained from trial {evaluation.parent}: "
            f"loss {evaluation.loss:.4g}, {evaluation.size_bytes:,} bytes"
        )
    return 0


def _print_prediction(prediction: "PredictionReport | None") -> None:
    from search.tables import stdout_console

    for line in () if prediction is None else prediction.lines():
        stdout_console().print(line, style="dim", highlight=False, soft_wrap=True)


def _print_latency(run: Path) -> None:
    from search.latency_tables import print_checks
    from search.profiling import latency_checks
    from search.tables import stdout_console

    print_checks(latency_checks(run), stdout_console())


def _explain(run: Path, trial: int, *, as_json: bool) -> int:
    from search.explain import explain, print_story
    from search.tables import stdout_console

    story = explain(run, trial)
    if as_json:
        print(json.dumps(story.to_json(), indent=1))
    else:
        print_story(story, stdout_console())
    return 0


def _print(front: "ParetoFront", *, as_json: bool) -> None:
    from search.tables import front_to_dict, print_front, stdout_console

    if as_json:
        print(json.dumps(front_to_dict(front), indent=1))
    else:
        print_front(front, stdout_console())


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
    as_json: JsonOption = False,
) -> int:
    """Two runs side by side: best point at equal sizes, hypervolumes on common constants."""
    from search.show import read_front
    from search.tables import compare_to_dict, print_comparison, stdout_console

    fronts, names = [read_front(first), read_front(second)], [str(first), str(second)]
    if as_json:
        print(json.dumps(compare_to_dict(fronts, names), indent=1))
    else:
        print_comparison(fronts, names, stdout_console())
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
    from search.tasks.table import SUMMARIES

    for name, summary in SUMMARIES.items():
        print(f"{name:18} {summary}")
    return 0


def strategies(as_json: JsonOption = False) -> int:
    """The capability table of the search methods."""
    from search.strategies.table import capability_table
    from search.tables import print_capabilities, stdout_console

    rows = capability_table()
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        print_capabilities(rows, stdout_console())
    return 0


def targets() -> int:
    """List the deployment targets and what they can run."""
    from search.targets import TARGETS

    for target in TARGETS.values():
        print(f"{target.name:14} {target.summary}")
    return 0
