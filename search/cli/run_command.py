"""`search run` and `search inspect`: the options that describe a run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from search.config import (
    CORRECTIONS,
    GRANULARITIES,
    PREPARATIONS,
    PROBE_SAMPLES,
    SEARCH_SAMPLES,
    RunConfig,
)

TaskOption = Annotated[
    str, typer.Option("--task", "-t", help="Built-in name, file.py:function or module:function.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", envvar="BITFRONT_DATA", help="Folder that holds the data sets."),
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="4MB, 105kB, bops=1G, macs=20M, ram=256kB, latency=2ms (with --latency-table), "
        "lut=20k, energy=20uJ. Repeatable.",
    ),
]
BitsOption = Annotated[
    str, typer.Option("--bits", help="Weight widths to choose from: 0,2,4,8 (1.6 is ternary).")
]
ActivationOption = Annotated[
    str, typer.Option("--activation-bits", help="8 fixes, 4,8 searches; empty keeps floats.")
]
PinOption = Annotated[
    list[str] | None,
    typer.Option("--pin", help="LAYER=BITS or edge:NAME=BITS; names may hold * and ?. Repeatable."),
]
GranularityOption = Annotated[
    str,
    typer.Option(
        "--granularity",
        help="One width per layer, group or channel; auto: layer, or channel where a strategy is "
        "for channels alone.",
    ),
]
DualOption = Annotated[
    str,
    typer.Option(
        "--dual",
        help="Layers that may be the sum of two low-bit tensors: names, which may hold * and ?, "
        "comma-separated, or auto for the worst few.",
    ),
]
TargetOption = Annotated[
    str, typer.Option("--target", help="Deployment target; see `search targets`.")
]
FpgaOption = Annotated[
    str | None,
    typer.Option("--fpga", help="Family for lut=, ff=, dsp=, bram=, cycles= budgets: xc7."),
]
SchemeOption = Annotated[
    str, typer.Option("--scheme", help="auto, mid_tread, mid_rise or affine weight levels.")
]
RangeOption = Annotated[
    str,
    typer.Option(
        "--range-setter",
        help="How scales are chosen: weighted_mse, mse, minmax, percentile, twn, aciq, sawb.",
    ),
]
ActivationRangesOption = Annotated[
    str,
    typer.Option(
        "--activation-ranges",
        help="auto (minmax at 8 bits, else mse), minmax, percentile, mse, aciq.",
    ),
]
CorrectionOption = Annotated[
    str,
    typer.Option(
        "--correction",
        help="Per channel: none, mean (bias), mean-spread (and scale), analytic (no data).",
    ),
]
PrepareOption = Annotated[
    str,
    typer.Option("--prepare", help="Before anything: equalize, absorb, or both, comma-separated."),
]
DistortionOption = Annotated[
    str,
    typer.Option(
        "--distortion",
        help="Single layers are run (exact) or predicted from gradients: linearized, gauss-newton, "
        "fisher, hessian-trace, gradient-l1.",
    ),
]
ObjectiveOption = Annotated[
    str,
    typer.Option("--objective", help="loss: divergence from the float model; metric: the task's."),
]
RecoverOption = Annotated[
    str,
    typer.Option(
        "--recover", help="none, fast (second-order rounding) or full (also learned, label-free)."
    ),
]
FinetuneOption = Annotated[
    str | None,
    typer.Option(
        "--finetune", help="Train finished points for 90s, 30m, 2h in all; needs training data."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Of training: auto, cpu or cuda.")]
CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        help="plain, or entropy: weights entropy-coded, a fifth of the trials spend freed bytes.",
    ),
]
LatencyTableOption = Annotated[
    str | None,
    typer.Option(
        "--latency-table", help="File of search profile, or a name that search tables lists."
    ),
]
ExtrapolateOption = Annotated[
    bool,
    typer.Option("--extrapolate", help="Let latencies of sizes outside the table be guessed."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the subcommands of this file."""
    app.command("run")(run)
    app.command("inspect")(inspect)


def run(
    budget: BudgetOption = None,
    task: TaskOption = "digits",
    data: DataOption = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Smallest model within so many points of the metric.")
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="One name or several, comma-separated.")
    ] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME.KEY=VALUE of a strategy. Repeatable.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Evaluations to make.")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Search time: 90s, 5m, 1h; no more trials after it.")
    ] = None,
    seed: int = 0,
    bits: BitsOption = "",
    activation_bits: ActivationOption = "",
    pin: PinOption = None,
    granularity: GranularityOption = "auto",
    dual: DualOption = "",
    target: TargetOption = "packed",
    latency_table: LatencyTableOption = None,
    extrapolate: ExtrapolateOption = False,
    fpga: FpgaOption = None,
    scheme: SchemeOption = "auto",
    range_setter: RangeOption = "weighted_mse",
    activation_ranges: ActivationRangesOption = "auto",
    correction: CorrectionOption = "mean-spread",
    prepare: PrepareOption = "",
    objective: ObjectiveOption = "loss",
    distortion: DistortionOption = "exact",
    recover: RecoverOption = "none",
    early_stop: Annotated[
        bool, typer.Option(help="Give up candidates that are sure to be worse than a known one.")
    ] = True,
    finetune: FinetuneOption = None,
    device: DeviceOption = "auto",
    codec: CodecOption = "plain",
    search_samples: Annotated[
        int, typer.Option(min=1, help="Validation samples that judge a candidate.")
    ] = SEARCH_SAMPLES,
    probe_samples: Annotated[
        int, typer.Option(min=1, help="Validation samples that judge a single layer.")
    ] = PROBE_SAMPLES,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers; 0 evaluates in this process.")
    ] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="Join a running Ray cluster, e.g. auto.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves its default.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="Any Optuna URL instead of the run's journal file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; new each time if absent.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Search, and write a Pareto front of packed models.

    With --resume every other option but --budget, --max-drop, --pin, --bits, --trials,
    --time-limit, --finetune, --workers, --ray-address and --threads keeps its stored value.
    """
    from quant_ops.calibration import ACTIVATION_SETTERS
    from quant_ops.coded import CODECS
    from quant_ops.perturbation import MEASURES
    from quant_ops.ranges import RANGE_SETTERS
    from search.cli.running import execute, resumed_config
    from search.durations import parse_duration
    from search.latency import table_from_anywhere
    from search.tasks.table import from_anywhere

    asked: dict[str, Any] = {
        "budgets": tuple(budget or ()),
        "max_drop": max_drop,
        "trials": trials,
        "time_limit_s": parse_duration(time_limit) if time_limit else None,
        "finetune_s": parse_duration(finetune) if finetune else None,
        "bits": _widths(bits),
        "pins": _pins(pin or []),
        "workers": workers,
        "ray_address": ray_address,
        "threads": threads,
    }
    if resume is not None:
        return execute(resumed_config(resume, asked, data), resume, resume=True, as_json=as_json)
    config = RunConfig(
        task=from_anywhere(task),
        data=str(Path(data).resolve()) if data else None,
        strategies=tuple(name.strip() for name in strategy.split(",")),
        settings=_pairs(settings or [], "--set"),
        seed=seed,
        activation_bits=_activation_bits(activation_bits),
        granularity=_one_of(granularity, GRANULARITIES, "--granularity"),
        dual=tuple(name.strip() for name in dual.split(",") if name.strip()),
        target=target,
        latency_table=table_from_anywhere(latency_table),
        extrapolate=extrapolate,
        fpga=fpga,
        scheme=_one_of(scheme, ("auto", "mid_tread", "mid_rise", "affine"), "--scheme"),
        range_setter=_one_of(range_setter, tuple(RANGE_SETTERS), "--range-setter"),
        activation_ranges=_one_of(
            activation_ranges, ("auto", *ACTIVATION_SETTERS), "--activation-ranges"
        ),
        correction=_one_of(correction, CORRECTIONS, "--correction"),
        prepare=tuple(
            _one_of(part.strip(), PREPARATIONS, "--prepare") for part in prepare.split(",") if part
        ),
        distortion=_one_of(distortion, ("exact", *MEASURES), "--distortion"),
        objective=_one_of(objective, ("loss", "metric"), "--objective"),
        recover=_one_of(recover, ("none", "fast", "full"), "--recover"),
        early_stop=early_stop,
        device=_one_of(device, ("auto", "cpu", "cuda"), "--device"),
        codec=_one_of(codec, CODECS, "--codec"),
        search_samples=search_samples,
        probe_samples=probe_samples,
        storage=storage,
        **asked,
    )
    return execute(config, out, resume=False, as_json=as_json)


def inspect(
    task: TaskOption = "digits",
    data: DataOption = None,
    budget: BudgetOption = None,
    bits: BitsOption = "",
    activation_bits: ActivationOption = "",
    pin: PinOption = None,
    granularity: GranularityOption = "auto",
    dual: DualOption = "",
    target: TargetOption = "packed",
    latency_table: LatencyTableOption = None,
    extrapolate: ExtrapolateOption = False,
    fpga: FpgaOption = None,
    as_json: JsonOption = False,
) -> int:
    """List every layer's fate, ties, reachable budgets and the expected search time."""
    from search.cli.running import load_task_for
    from search.inspection import inspect_task
    from search.latency import table_from_anywhere
    from search.progress import ConsoleListener

    config = RunConfig(
        task=task,
        data=data,
        budgets=tuple(budget or ()),
        bits=_widths(bits),
        activation_bits=_activation_bits(activation_bits),
        pins=_pins(pin or []),
        granularity=_one_of(granularity, GRANULARITIES, "--granularity"),
        dual=tuple(name.strip() for name in dual.split(",") if name.strip()),
        target=target,
        latency_table=table_from_anywhere(latency_table),
        extrapolate=extrapolate,
        fpga=fpga,
    )
    with ConsoleListener() as listener:
        report = inspect_task(load_task_for(config, listener), config)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        report.print()
    return 0


def _widths(text: str) -> tuple[float, ...]:
    from quant_ops.bit_widths import parse_bit_width
    from quant_ops.errors import UsageError

    try:
        return tuple(sorted({parse_bit_width(t.strip()) for t in text.split(",") if t.strip()}))
    except ValueError as error:
        raise UsageError(f"--bits {text}: {error}") from error


def _activation_bits(text: str) -> tuple[int, ...]:
    from quant_ops.errors import UsageError

    try:
        widths = tuple(sorted({int(t) for t in text.split(",") if t.strip()}))
    except ValueError:
        widths = (0,)
    if any(not 2 <= b <= 8 for b in widths):
        raise UsageError(f"--activation-bits takes whole numbers from 2 to 8, got {text!r}")
    return widths


def _pins(texts: list[str]) -> dict[str, float]:
    from quant_ops.bit_widths import parse_bit_width
    from quant_ops.errors import UsageError

    try:
        return {name: parse_bit_width(b) for name, b in _pairs(texts, "--pin").items()}
    except ValueError as error:
        raise UsageError(f"--pin: {error}") from error


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    from quant_ops.errors import UsageError

    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} wants NAME=VALUE, got {text!r}")
        out[name] = value
    return out


def _one_of(value: str, legal: tuple[str, ...], option: str) -> str:
    from quant_ops.errors import UsageError

    if value not in legal:
        raise UsageError(f"{option} must be one of {', '.join(legal)}, got {value!r}")
    return value
