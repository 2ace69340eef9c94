"""ONNX for ONNX Runtime: weights at their true width, integers where the program has them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError, VerificationError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from quant_ops.reduced import reduced_model
from quant_ops.reference import run_torch
from quant_ops.runtime_mode import changed_codes, run_runtime_mode
from search.exporters.base import Companions, Exporter, Outputs, Promise, Refusal, Runner
from search.exporters.manifest import VECTORS

FILE = "model.onnx"
RUNTIME, EXACT = "runtime", "exact"
INTEGERS = Promise(
    0.0,
    "equal, bit for bit, to the reference with ONNX Runtime's rounding (float32 scale, half to "
    "even); against the normative reference each step changes at most 1e-3 of its codes, by 1",
)
MIXED = Promise(
    0.2,
    "integer steps equal the reference with ONNX Runtime's rounding; float operators between "
    "them differ in the last digits, which can move codes by 1",
)
NORMATIVE = Promise(
    0.0, "every integer equals the normative reference without removed channels, bit for bit"
)
NORMATIVE_MIXED = Promise(
    0.2,
    "integer steps equal the normative reference; float operators between them differ in the last "
    "digits, which can move codes by 1",
)
FLOATS = Promise(1e-4, "float32 on the stored weights, close to the reference")
BLOCKS = Promise(
    0.1,
    "float32 on the stored weights, but MatMulNBits rounds the inputs of large linear layers to 8 "
    "bits block by block: close to the reference",
)


class OnnxExporter(Exporter):
    """One file; weights are widened when a session is created.

    Args:
        arithmetic: of integer steps: "runtime", ONNX Runtime's own rounding and its fastest
            kernels, or "exact", the normative integers.
    """

    name = "onnx"
    summary = "ONNX for ONNX Runtime on servers: weights at their true width, integer kernels"
    exactness = INTEGERS.text

    def __init__(self, arithmetic: str = RUNTIME) -> None:
        if arithmetic not in (RUNTIME, EXACT):
            raise UsageError(f"--arithmetic must be {RUNTIME} or {EXACT}, got {arithmetic!r}")
        self._exact = arithmetic == EXACT

    def in_arithmetic(self, arithmetic: str) -> Exporter:
        return OnnxExporter(arithmetic)

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        from search.exporters.onnx_graph.network import write_network

        if self._exact and not packed.model.candidate.activations:
            return [
                Refusal(
                    f"--arithmetic {EXACT}",
                    "activations are not quantized, so that every operator computes in float32",
                    f"search with --activation-bits 8, or leave --arithmetic {EXACT} away",
                )
            ]
        return write_network(reduced_model(packed.model), exact=self._exact).refusals

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        metadata = self._metadata(packed, companions)
        (path / FILE).write_bytes(onnx_bytes(packed.model, metadata, exact=self._exact))

    def open(self, path: Path) -> Runner:
        return runner_of(sound_bytes(path / FILE), path / FILE)

    def snippet(self, path: Path) -> str:
        return (
            "import onnxruntime\n"
            "from safetensors.numpy import load_file\n"
            f"session = onnxruntime.InferenceSession({str(path / FILE)!r})\n"
            f"vectors = load_file({str(path / VECTORS)!r})\n"
            "inputs = {x.name: vectors[f'input.{i}'] for i, x in enumerate(session.get_inputs())}\n"
            "outputs = session.run(None, inputs)"
        )

    def expected(self, packed: PackedModel, inputs: Sequence[Tensor]) -> Outputs:
        program = lower(reduced_model(packed.model))
        run = run_torch if self._exact else run_runtime_mode
        values = run(program, [x.numpy() for x in inputs]).values
        return [torch.as_tensor(value) for value in values]

    def promise(self, packed: PackedModel) -> Promise:
        model = reduced_model(packed.model)
        if model.candidate.activations:
            integers, mixed = (NORMATIVE, NORMATIVE_MIXED) if self._exact else (INTEGERS, MIXED)
            return mixed if lower(model).float_islands else integers
        from search.exporters.onnx_graph.float_layers import runs_in_blocks

        return BLOCKS if runs_in_blocks(model) else FLOATS

    def facts(self, packed: PackedModel, path: Path, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
        if self._exact or not packed.model.candidate.activations:
            return {}
        shares = changed_codes(lower(reduced_model(packed.model)), [x.numpy() for x in inputs])
        worst = max((share for share, _ in shares.values()), default=0.0)
        by = max((distance for _, distance in shares.values()), default=0)
        return {
            "against_the_normative_reference": (
                f"from equal inputs at most {worst:.2g} of a step's codes differ, by {by}"
            )
        }

    def float_runner(self, packed: PackedModel) -> tuple[str, Runner] | None:
        model = packed.model
        nothing: dict[str, Any] = {}
        plain = QuantizedModel(model.graph, Candidate((), ()), nothing, nothing, model.params())
        return "float32 in ONNX Runtime", runner_of(onnx_bytes(plain, {}), Path(FILE))

    def _metadata(self, packed: PackedModel, companions: Companions) -> dict[str, Any]:
        preprocessing = companions.preprocessing
        return {
            "bitfront.digest": packed.digest,
            "bitfront.arithmetic": EXACT if self._exact else RUNTIME,
            "bitfront.assignment": companions.assignment or packed.model.candidate.to_json(),
            "bitfront.class_names": list(companions.class_names),
            "bitfront.preprocessing": None if preprocessing is None else asdict(preprocessing),
            **{f"bitfront.{key}": value for key, value in companions.origin.items()},
        }


def onnx_bytes(model: QuantizedModel, metadata: Mapping[str, Any], *, exact: bool = False) -> bytes:
    """The checked file of a model that can be expressed; `exact`: with normative rescalings."""
    import onnx
    from onnx import helper

    from search.exporters.onnx_graph.network import write_network

    written = write_network(reduced_model(model), exact=exact).model
    assert written is not None
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for key, value in metadata.items()
    }
    helper.set_model_props(written, texts)
    onnx.checker.check_model(written, full_check=True)
    content: bytes = written.SerializeToString()
    return content


def sound_bytes(path: Path) -> bytes:
    """The bytes of an ONNX file that is what this exporter writes.

    Raises:
        VerificationError: it is damaged, or holds what no export holds.
    """
    from search.exporters.onnx_graph.reading import require_sound

    try:
        content = path.read_bytes()
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror or error}") from error
    require_sound(content, path)
    return content


def runner_of(content: bytes, path: Path) -> Runner:
    """Runs a model that is in memory, on one thread.

    Raises:
        VerificationError: ONNX Runtime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this
        raise VerificationError(
            f"ONNX Runtime refuses {path}: {str(error).splitlines()[0]}"
        ) from error
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> Outputs:
        arrays = {
            name: np.ascontiguousarray(x.numpy()) for name, x in zip(names, inputs, strict=True)
        }
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, arrays)]

    return run
