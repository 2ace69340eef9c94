"""`search verify`: is a packed file, or an exported folder, what it claims to be?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant_ops.dual import main_of, without_unused_layers
from quant_ops.errors import UsageError, VerificationError
from quant_ops.graph import Layer
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.removal import canonical_columns, plan_removal
from quant_ops.slots import Ids
from search.budget import format_size
from search.config import RunConfig, read_config
from search.exporters.base import list_files
from search.exporters.delivery import compare
from search.exporters.manifest import VECTORS, read_manifest
from search.exporters.table import find_exporter
from search.finish import measure_packed
from search.judge import Measurement
from search.prepare import Prepared, prepare
from search.vectors import TOLERANCE, Vectors, largest_difference, vectors_path

NARROW_MARGIN = 1e-4


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found; `facts` in the order of checking."""

    path: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {"file": str(self.path), **self.facts}

    def to_text(self) -> str:
        """One line per check."""
        lines = [f"{self.path}: sound"]
        return "\n".join(
            lines + [f"  {key.replace('_', ' ')}: {value}" for key, value in self.facts.items()]
        )


def verify_file(
    path: Path, *, task: str | None = None, run: Path | None = None, data: str | None = None
) -> VerifyReport:
    """Check integrity, then the test vectors beside the file, then (with a task) the metric.

    Args:
        path: a packed file, or a folder that `search export` wrote.
        task: name of the task it was made from; its metric is measured.
        run: folder of the run it was made in; codes, scales and biases are compared one by one.
        data: folder of the data sets.

    Raises:
        VerificationError: the file is damaged, or computes something else than it should.
    """
    if path.is_dir():
        return VerifyReport(path, _verify_folder(path, task, run, data))
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    packed = PackedModel.load(path)
    facts: dict[str, Any] = {
        "size": f"{format_size(packed.size_bytes)} ({packed.size_bytes:,} bytes)",
        "digest": packed.digest,
        "codec": packed.codec,
        "layers": len(packed.model.layers),
    }
    facts["test_vectors"] = _check_vectors(path, packed)
    if run is not None:
        facts.update(_compare_with_run(packed, path, run, data))
    if task is not None:
        facts.update(_measure_on_task(packed, task, run, data))
    return VerifyReport(path, facts)


def _verify_folder(
    path: Path, task: str | None, run: Path | None, data: str | None
) -> dict[str, Any]:
    """Files against their digests, the artefact against its test vectors and the task."""
    manifest = read_manifest(path)
    exporter = find_exporter(manifest.target)
    runner = exporter.open(path)
    vectors = Vectors.load(path / VECTORS, manifest.digest)
    difference = compare(manifest.promise.tolerance, runner, vectors, path)
    facts: dict[str, Any] = {
        "target": manifest.target,
        "files": list_files(manifest.files),
        "digest": manifest.digest,
        "test_vectors": f"{vectors.inputs[0].shape[0]} run, largest relative difference from the "
        f"reference {difference:.2g}",
        "exactness": manifest.promise.text,
    }
    if task is not None:
        from search.export import measure_runner

        prepared = _prepared(task, run, data)
        measured = measure_runner(prepared, runner)
        facts |= _quality(prepared, measured)
    return facts


def _check_vectors(path: Path, packed: PackedModel) -> str:
    beside = vectors_path(path)
    if not beside.exists():
        return f"none beside the file ({beside.name}); only integrity was checked"
    vectors = Vectors.load(beside, packed.digest)
    worst = largest_difference(packed, vectors)
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{path} does not compute what {beside.name} says: outputs differ by {worst:.3g} of "
            f"their largest value, at most {TOLERANCE:g} is allowed; export it again"
        )
    n = vectors.inputs[0].shape[0]
    return f"{n} run, largest relative difference {worst:.2g}"


def _prepared(task: str, run: Path | None, data: str | None) -> Prepared:
    from search.tasks.table import load_task

    config = read_config(run)[0] if run is not None else RunConfig(task=task)
    folder = data or config.data
    return prepare(load_task(task, data=Path(folder) if folder else None), config)


def _measure_on_task(
    packed: PackedModel, task: str, run: Path | None, data: str | None
) -> dict[str, Any]:
    prepared = _prepared(task, run, data)
    _require_same_structure(packed, prepared)
    measured = measure_packed(prepared, packed, "validation")
    facts = _quality(prepared, measured)
    narrow = _narrow_margins(prepared)
    if narrow is not None:
        facts["narrow_margins"] = (
            f"{narrow} validation samples whose two top float outputs lie within {NARROW_MARGIN:g}"
            f" may fall either way on another machine"
        )
    return facts


def _quality(prepared: Prepared, measured: Measurement) -> dict[str, Any]:
    metric = prepared.task.metric
    return {
        "quality_loss": measured.loss,
        "metric": f"{metric.name} {metric.format(measured.metric)} on validation",
    }


def _narrow_margins(prepared: Prepared) -> int | None:
    judge = prepared.evaluator.judge("validation")
    count = 0
    for outputs in judge.float_outputs:
        if not (isinstance(outputs, torch.Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1):
            return None
        top = outputs.topk(2, dim=1).values
        count += int((top[:, 0] - top[:, 1] < NARROW_MARGIN).sum())
    return count


def _compare_with_run(
    packed: PackedModel, path: Path, run: Path, data: str | None
) -> dict[str, Any]:
    config, _ = read_config(run)
    prepared = _prepared(config.task, run, data)
    _require_same_structure(packed, prepared)
    from search.record import Record

    plain = PackedModel.from_model(packed.model)
    sizes, digests = {packed.size_bytes, plain.size_bytes}, {packed.digest, plain.digest}
    alike = {}
    for evaluation in Record.open(run, storage=config.storage).evaluations():
        if evaluation.size_bytes in sizes and not evaluation.pruned:
            alike[evaluation.trial] = evaluation
    for trial, evaluation in alike.items():
        if evaluation.recipe:  # its weights are not a function of its widths
            if evaluation.weights_digest in digests:
                return {"codes": f"equal to trial {trial} of {run}: the same weights"}
            continue
        model = prepared.evaluator.bank.quantize(evaluation.candidate)
        if first_difference(packed.model, model) is None:
            return {"codes": f"equal to trial {trial} of {run}: codes, scales and biases"}
    raise VerificationError(
        f"{path} equals no trial of {run} code for code; it was made from other weights, "
        f"calibration or widths"
    )


def first_difference(a: QuantizedModel, b: QuantizedModel) -> str | None:
    """Name (in `b`) of the first layer whose codes, scales or biases differ; None if all agree.

    Layers are compared in order, since a packed file holds no names. Columns that removal
    makes absent are not compared: they are multiplied by zeros.
    """
    a, b = without_unused_layers(a), without_unused_layers(b)
    if len(a.layers) != len(b.layers):
        return "the number of layers"
    columns = plan_removal(b.graph, b.candidate).columns
    for mine, (name, theirs) in zip(a.layers.values(), b.layers.items(), strict=True):
        layer, kept = b.graph.layer_of[name], columns.get(name)
        if not _same_constants(mine, theirs):
            return name
        if not np.array_equal(_present(layer, mine, kept), _present(layer, theirs, kept)):
            return name
    if list(a.activations.values()) != list(b.activations.values()):
        return "the activation quantizers"
    return None


def _same_constants(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    if a.bit_widths != b.bit_widths or a.mid_rise != b.mid_rise:
        return False
    if not np.array_equal(a.channel_scales(), b.channel_scales()):
        return False
    bias_a, bias_b = a.bias_values(), b.bias_values()
    if (bias_a is None) != (bias_b is None):
        return False
    return bias_a is None or bias_b is None or torch.equal(bias_a, bias_b)


def _present(layer: Layer, quantized: QuantizedLayer, columns: Ids | None) -> NDArray[np.int16]:
    """Codes of the columns that are left."""
    if columns is None or quantized.codes.size != layer.n_weights:
        return quantized.codes
    by_column = quantized.codes.reshape(layer.out_channels, canonical_columns(layer), -1)
    return by_column[:, columns]


def _require_same_structure(packed: PackedModel, prepared: Prepared) -> None:
    mine, wanted = (
        # a residual layer that is not used is not in the file
        [layer.weight_shape for layer in graph.layers if layer.name not in main_of(graph)]
        for graph in (packed.model.graph, prepared.traced.graph)
    )
    if mine != wanted:
        raise VerificationError(
            f"the file holds another network than task {prepared.task.name!r}: "
            f"{len(mine)} layers against {len(wanted)}, or other shapes"
        )
