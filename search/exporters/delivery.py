"""An artefact is written, run, compared, and only then handed over."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quant_ops.errors import EnvironmentFault, VerificationError
from quant_ops.packed import PackedModel
from search.exporters.base import (
    Companions,
    Exporter,
    Report,
    Runner,
    relative_difference,
    require_expressible,
)
from search.exporters.manifest import VECTORS, file_sizes, write_manifest
from search.vectors import Vectors, vectors_path

Measure = Callable[[Runner], Mapping[str, Any]]


def deliver(
    exporter: Exporter,
    packed: PackedModel,
    out: Path,
    companions: Companions,
    measure: Measure = lambda runner: {},
) -> Report:
    """Write `packed` for a target to `out`, and prove it.

    Args:
        exporter: the target.
        packed: the model.
        out: file or folder, as the exporter has it. A folder that exists is replaced whole.
        companions: what travels with it.
        measure: further findings about the running artefact.

    Raises:
        UsageError: the target cannot express the model; nothing is written.
        VerificationError: the artefact does not compute what it must; nothing is left behind.
        EnvironmentFault: it cannot be written or run here.
    """
    require_expressible(exporter, packed)
    vectors, promise = companions.vectors, exporter.promise(packed)
    own = tuple(exporter.expected(packed, vectors.inputs))
    if relative_difference(own, vectors.outputs) > 0:
        vectors = Vectors(vectors.inputs, vectors.outputs, vectors.digest, own)
    if exporter.is_file:
        return _deliver_file(exporter, packed, out, vectors, measure, companions)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        exporter.write(packed, part, companions)
        vectors.save(part / VECTORS)
        runner = exporter.open(part)
        difference = compare(promise.tolerance, runner, vectors, out)
        facts = {
            **exporter.facts(packed, part, vectors.inputs),
            "exactness": promise.text,
            **measure(runner),
        }
        write_manifest(exporter.name, promise, part, packed.digest, companions, facts)
        files = file_sizes(part)
        _replace(part, out)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write {out}: {error.strerror or error}; free some space or choose a folder "
            f"that can be written"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Report(exporter.name, out, files, difference, facts, exporter.snippet(out))


def _deliver_file(
    exporter: Exporter,
    packed: PackedModel,
    out: Path,
    vectors: Vectors,
    measure: Measure,
    companions: Companions,
) -> Report:
    out.parent.mkdir(parents=True, exist_ok=True)
    exporter.write(packed, out, companions)
    runner, promise = exporter.open(out), exporter.promise(packed)
    difference = compare(promise.tolerance, runner, vectors, out)
    beside = vectors_path(out)
    vectors.save(beside)
    files = {path.name: path.stat().st_size for path in (out, beside)}
    facts = {
        **exporter.facts(packed, out, vectors.inputs),
        "vectors": f"{vectors.inputs[0].shape[0]} in {beside.name}",
        "exactness": promise.text,
        **measure(runner),
    }
    return Report(exporter.name, out, files, difference, facts, exporter.snippet(out))


def compare(tolerance: float, runner: Runner, vectors: Vectors, path: Path) -> float:
    """Largest difference from the referee, over its largest output.

    Raises:
        VerificationError: outputs differ from what the target must compute by more than allowed.
    """
    outputs = runner(vectors.inputs)
    worst = relative_difference(outputs, vectors.own or vectors.outputs)
    if not worst <= tolerance:
        raise VerificationError(
            f"{path} does not compute what its test vectors say: outputs differ by {worst:.3g} of "
            f"their largest value, at most {tolerance:g} is allowed; export it again"
        )
    return relative_difference(outputs, vectors.outputs)


def _replace(part: Path, out: Path) -> None:
    """Put a finished folder in the place of an old one."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    with contextlib.suppress(FileNotFoundError):
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
