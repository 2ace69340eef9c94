"""`search export`: one point of a run as an artefact of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_ops.coded import CODECS
from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from search.budget import format_size
from search.config import RunConfig, read_config
from search.evaluation import Evaluation
from search.finish import pack_trial
from search.prepare import Prepared, prepare
from search.record import Record
from search.show import read_front
from search.vectors import make_vectors, vectors_path

FORMATS = ("packed",)


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    trial: int
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {"file": str(self.path), "trial": self.trial, **self.facts}

    def to_text(self) -> str:
        """A few lines, the last one how to load the file."""
        lines = [f"{self.path}: trial {self.trial}, {format_size(int(self.facts['size_bytes']))}"]
        if self.facts["codec"] != CODECS[0]:
            lines.append(f"  codec: {self.facts['codec']} (format version 2)")
        lines.append(f"  test vectors: {self.facts['vectors']}")
        lines.append("  load it: from quant_ops.packed import PackedModel")
        lines.append(f"           outputs = PackedModel.load({str(self.path)!r})(inputs)")
        return "\n".join(lines)


def export_trial(
    run: Path,
    out: Path,
    *,
    trial: int | None = None,
    best: str | None = None,
    to: str = "packed",
    codec: str | None = None,
    force: bool = False,
    data: str | None = None,
) -> ExportReport:
    """Write trial `trial`, or the best point of at most `best` bytes, to `out`.

    The packed file written at the end of the run is copied; a trial that was not packed yet
    (the run was killed, or it is not on the front) is quantized again from the task.

    With `codec` "plain" or "entropy" the same weights are packed that way.

    Raises:
        UsageError: no such trial, format or codec, or `out` exists.
    """
    if to not in FORMATS:
        raise UsageError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if codec not in (None, *CODECS):
        raise UsageError(f"--codec must be one of {', '.join(CODECS)}, got {codec!r}")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; choose another --out or add --force")
    if out.is_dir():
        raise UsageError(f"--out must name a file, {out} is a folder")
    config, _ = read_config(run)
    evaluation = choose_trial(run, trial=trial, best=best, storage=config.storage)
    prepared = _prepare(config, data)
    packed = pack_trial(prepared, evaluation, run)
    if codec is not None:
        packed = PackedModel.from_model(packed.model, codec)
    out.parent.mkdir(parents=True, exist_ok=True)
    packed.save(out)
    written = PackedModel.load(out)
    inputs, _ = prepared.spec.splits["validation"].batches[0]
    vectors = make_vectors(written, inputs)
    vectors.save(vectors_path(out))
    return ExportReport(
        out,
        evaluation.trial,
        {
            "size_bytes": written.size_bytes,
            "digest": packed.digest,
            "codec": packed.codec,
            "vectors": f"{vectors.inputs[0].shape[0]} in {vectors_path(out).name}",
        },
    )


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
