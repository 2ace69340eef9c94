"""`search export`: one point of a run as an artefact of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from quant_ops.coded import CODECS
from quant_ops.errors import UsageError
from quant_ops.executor import Executor
from quant_ops.packed import PackedModel
from search.config import RunConfig, read_config
from search.evaluation import Evaluation
from search.exporters.activations import ADDED_BITS, with_activations
from search.exporters.base import Companions, Exporter, Report, Runner
from search.exporters.delivery import deliver
from search.exporters.manifest import NAME as MANIFEST
from search.exporters.table import find_exporter
from search.exporters.timing import times_beside_float
from search.finish import measure_packed, pack_trial
from search.judge import Measurement, are_logits
from search.prepare import Prepared, prepare
from search.record import Record
from search.show import read_front
from search.vectors import make_vectors, run_packed

LOGITS_DIM = 2  # (samples, classes)


def export_trial(
    run: Path,
    out: Path,
    *,
    trial: int | None = None,
    best: str | None = None,
    to: str = "packed",
    codec: str | None = None,
    arithmetic: str | None = None,
    strict: bool = False,
    force: bool = False,
    data: str | None = None,
) -> Report:
    """Write trial `trial`, or the best point of at most `best` bytes, to `out`.

    The packed file written at the end of the run is taken; a trial that was not packed yet
    (the run was killed, or it is not on the front) is quantized again from the task.

    Where the target computes in integers and only the weights were quantized, activations are
    calibrated to 8 bits; with `strict` that is refused. With `codec` "plain" or "entropy" the same
    weights are packed that way (target packed only). With `arithmetic` "exact" or "runtime" integer
    steps are rescaled as the reference does, or as the target's kernels do (target onnx only).

    Raises:
        UsageError: no such trial, target, codec or arithmetic, `out` exists, or the target cannot
            express it.
    """
    exporter = find_exporter(to)
    if arithmetic is not None:
        exporter = exporter.in_arithmetic(arithmetic)
    if codec not in (None, *CODECS):
        raise UsageError(f"--codec must be one of {', '.join(CODECS)}, got {codec!r}")
    if codec is not None and to != "packed":
        raise UsageError(f"--codec is for packed files, --to {to} stores weights in its own way")
    _require_free(exporter, out, force)
    config, _ = read_config(run)
    evaluation = choose_trial(run, trial=trial, best=best, storage=config.storage)
    prepared = _prepare(config, data)
    packed = pack_trial(prepared, evaluation, run)
    if codec is not None:
        packed = PackedModel.from_model(packed.model, codec)
    notes: dict[str, Any] = {}
    if exporter.needs_integers and not packed.model.candidate.activations:
        packed = _calibrated(prepared, packed, evaluation, strict, to, notes)
    inputs, _ = prepared.spec.splits["validation"].batches[0]
    companions = Companions(
        make_vectors(packed, inputs),
        tuple(prepared.task.class_names),
        prepared.task.preprocessing,
        {"task": prepared.task.name, "trial": evaluation.trial},
        evaluation.candidate.to_json(),
    )
    report = deliver(exporter, packed, out, companions, _measuring(prepared, exporter, packed))
    return report.with_facts({"trial": evaluation.trial, **notes})


def _require_free(exporter: Exporter, out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; choose another --out or add --force")
    if out.exists() and exporter.is_file == out.is_dir():
        wanted, found = ("file", "folder") if exporter.is_file else ("folder", "file")
        raise UsageError(f"--out must name a {wanted}, {out} is a {found}")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} holds something else than an export; choose another --out")


def _calibrated(
    prepared: Prepared,
    packed: PackedModel,
    evaluation: Evaluation,
    strict: bool,
    to: str,
    notes: dict[str, Any],
) -> PackedModel:
    """The same weights with activations of 8 bits; what that costs goes to `notes`."""
    if strict:
        raise UsageError(
            f"target {to!r} computes in integers, and trial {evaluation.trial} has float "
            f"activations; search with --activation-bits 8, or export without --strict"
        )
    before = measure_packed(prepared, packed, "validation")
    packed = with_activations(
        packed, prepared.spec.splits["calibration"], prepared.spec.activation_ranges
    )
    after = measure_packed(prepared, packed, "validation")
    metric = prepared.task.metric
    notes["activations"] = (
        f"calibrated to {ADDED_BITS} bits for this target: {metric.name} "
        f"{metric.format(before.metric)} before, {metric.format(after.metric)} after; loss "
        f"{before.loss:.4g}, {after.loss:.4g}"
    )
    return packed


def _measuring(
    prepared: Prepared, exporter: Exporter, packed: PackedModel
) -> Callable[[Runner], Mapping[str, Any]]:
    """Quality on the whole validation split and time beside float32, of the running artefact."""

    def measure(runner: Runner) -> Mapping[str, Any]:
        measured = measure_runner(prepared, runner)
        metric = prepared.task.metric
        inputs, _ = prepared.spec.splits["validation"].batches[0]
        executor = Executor(prepared.traced.graph)
        in_torch = lambda x: executor(prepared.traced.params, tuple(x))  # noqa: E731
        beside = {} if exporter.is_file else _beside_reference(prepared, packed, runner)
        name, baseline = exporter.float_runner(packed) or ("float32 in torch", in_torch)
        return {
            "metric": f"{metric.name} {metric.format(measured.metric)} on validation",
            "quality_loss": measured.loss,
            **beside,
            **({} if exporter.is_simulated else times_beside_float(runner, baseline, name, inputs)),
        }

    return measure


def _beside_reference(prepared: Prepared, packed: PackedModel, runner: Runner) -> Mapping[str, Any]:
    """Classifiers: how many top classes of validation change, and how near those were to a tie."""
    changed, total, margin, largest = 0, 0, 0.0, 0.0
    for inputs, _ in prepared.spec.splits["validation"].batches:
        (mine, *more), (wanted, *_) = runner(inputs), run_packed(packed, tuple(inputs))
        if more or not are_logits(wanted) or wanted.dim() != LOGITS_DIM:
            return {}
        largest = max(largest, float((mine - wanted).abs().max()))
        moved = mine.argmax(1) != wanted.argmax(1)
        top = wanted[moved].topk(2, dim=1).values
        changed, total = changed + int(moved.sum()), total + len(wanted)
        margin = max([margin, *(top[:, 0] - top[:, 1]).tolist()])
    said = f"{changed} of {total} validation samples"
    if changed:
        said += (
            f", where the reference's margin was at most {margin:.2g}; logits differ by at most "
            f"{largest:.2g}"
        )
    elif not largest:
        said += ", every output equal"
    return {"changed_top_class": said}


def measure_runner(prepared: Prepared, runner: Runner) -> Measurement:
    """Quality of a running artefact on the whole validation split."""
    spec = prepared.traced.out_spec

    def run(inputs: Any) -> Any:
        return pytree.tree_unflatten(list(runner(inputs)), spec)

    return prepared.evaluator.judge("validation").measure(run)


def choose_trial(
    run: Path, *, trial: int | None, best: str | None, storage: str | None = None
) -> Evaluation:
    """The trial asked for by number or by size.

    Raises:
        UsageError: neither or both were given, or the trial is not in the record.
    """
    if (trial is None) == (best is None):
        raise UsageError("name one point: either --trial NUMBER or --best SIZE")
    evaluations = Record.open(run, storage=storage).evaluations()
    if trial is not None:
        for evaluation in evaluations:
            if evaluation.trial == trial and not evaluation.pruned:
                return evaluation
        raise UsageError(
            f"{run} holds no finished trial {trial}; `search show {run}` lists the front"
        )
    assert best is not None
    return read_front(run).best(best)


def _prepare(config: RunConfig, data: str | None) -> Prepared:
    from search.tasks.table import load_task

    folder = data or config.data
    task = load_task(config.task, data=Path(folder) if folder else None)
    return prepare(task, config)
