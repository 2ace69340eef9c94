"""The end of a run: front points packed, re-read, measured on the whole validation split."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant_ops.errors import VerificationError
from quant_ops.executor import Executor
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.reference import run_torch
from search.evaluation import CODED, Evaluation
from search.judge import Measurement
from search.prepare import Prepared

Run = Callable[[tuple[Tensor, ...]], Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """What the re-read file of one trial does on the whole validation split."""

    trial: int
    size_bytes: int
    digest: str
    loss: float
    loss_stderr: float
    metric: float | None
    agreement: float | None


def packed_path(folder: Path, trial: int) -> Path:
    """Where the packed file of a trial lies in a run's folder."""
    return folder / "packed" / f"{trial}.safetensors"


def runner_of(packed: PackedModel, out_spec: pytree.TreeSpec | None = None) -> Run:
    """A function from inputs to outputs that runs what the file holds.

    Weights alone: the reduced graph in float32 on the stored values. Quantized activations: the
    code-domain reference, integers throughout.
    """
    if packed.model.candidate.activations:
        program = lower(packed.model)

        def run(inputs: tuple[Tensor, ...]) -> Any:
            outputs = run_torch(program, [x.numpy() for x in inputs])
            return _tree([torch.as_tensor(a) for a in outputs.values], out_spec)

        return run
    graph, params = packed.reduced()
    executor = Executor(graph)
    return lambda inputs: _tree(list(executor(params, inputs)), out_spec)


def _tree(outputs: list[Tensor], out_spec: pytree.TreeSpec | None) -> Any:
    if out_spec is not None:
        return pytree.tree_unflatten(outputs, out_spec)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def pack_trial(prepared: Prepared, evaluation: Evaluation, folder: Path) -> PackedModel:
    """The packed file of a trial, written if it is not there yet, re-read in any case.

    Raises:
        VerificationError: the file is not as long as the search said.
    """
    path = packed_path(folder, evaluation.trial)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_again(prepared, evaluation, folder).save(path)
    packed = PackedModel.load(path)
    if packed.size_bytes != evaluation.size_bytes:
        raise VerificationError(
            f"{path} has {packed.size_bytes:,} bytes, trial {evaluation.trial} was recorded with "
            f"{evaluation.size_bytes:,}; delete the file to have it written again"
        )
    if evaluation.recipe and packed.digest != evaluation.weights_digest:
        raise VerificationError(
            f"{path} holds other weights than trial {evaluation.trial} was recorded with"
        )
    return packed


def _write_again(prepared: Prepared, evaluation: Evaluation, folder: Path) -> PackedModel:
    codec = CODED if evaluation.coded else "plain"
    if evaluation.recipe in ("", CODED):  # the weights follow from the widths
        model = prepared.evaluator.bank.quantize(evaluation.candidate)
        return PackedModel.from_model(model, codec)
    if evaluation.coded and evaluation.parent is not None:
        parent = packed_path(folder, evaluation.parent)
        if parent.exists():
            return PackedModel.from_model(PackedModel.load(parent).model, codec)
    raise VerificationError(
        f"{packed_path(folder, evaluation.trial)} is missing, and trial {evaluation.trial} "
        f"({evaluation.recipe}) cannot be written from its widths alone; recover its parent "
        f"again: search recover {folder} --trial {evaluation.parent}"
    )


def measure_packed(prepared: Prepared, packed: PackedModel, split: str) -> Measurement:
    """Quality of what the file holds, on one split."""
    run = runner_of(packed, prepared.traced.out_spec)
    return prepared.evaluator.judge(split).measure(run)


def check_trials(
    prepared: Prepared,
    evaluations: Sequence[Evaluation],
    folder: Path,
    *,
    known: Iterable[Checked] = (),
    on_checked: Callable[[Checked], None] = lambda checked: None,
) -> list[Evaluation]:
    """Pack, re-read and measure each trial; the evaluations with the measured quality.

    Args:
        prepared: the task.
        evaluations: trials to check.
        folder: of the run.
        known: earlier results, not measured again.
        on_checked: called with every new result.
    """
    results = {checked.trial: checked for checked in known}
    out = []
    for evaluation in evaluations:
        checked = results.get(evaluation.trial)
        if checked is None or not packed_path(folder, evaluation.trial).exists():
            packed = pack_trial(prepared, evaluation, folder)
            measured = measure_packed(prepared, packed, "validation")
            checked = Checked(
                trial=evaluation.trial,
                size_bytes=packed.size_bytes,
                digest=packed.digest,
                loss=measured.loss,
                loss_stderr=measured.loss_stderr,
                metric=measured.metric,
                agreement=measured.agreement,
            )
            on_checked(checked)
        out.append(
            replace(
                evaluation,
                loss=checked.loss,
                loss_stderr=checked.loss_stderr,
                metric=checked.metric,
                agreement=checked.agreement,
                weights_digest=checked.digest,
            )
        )
    return out
