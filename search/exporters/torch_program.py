"""A self-contained torch.export program (.pt2): packed weights, no code of ours to load it."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quant_ops.errors import VerificationError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.reduced import reduced_model
from quant_ops.reference import run_torch
from search.exporters.base import Companions, Exporter, Outputs, Promise, Refusal, Runner
from search.exporters.manifest import VECTORS

FILE = "model.pt2"
FLOATS = Promise(1e-4, "float operators in float32 on the stored weights, close to the reference")
_EXAMPLES = 2  # a batch of one would be taken for a constant


class TorchExporter(Exporter):
    """The code-domain reference as a graph of torch operators."""

    name = "torch"
    summary = "a torch.export program (.pt2) with packed weights, for torch alone"
    exactness = "every integer equals the reference without removed channels, on every machine"

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        return ()

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        from search.exporters.torch_graph import PackedProgram

        module = PackedProgram(reduced_model(packed.model)).eval()
        inputs = tuple(x[:_EXAMPLES].clone() for x in companions.vectors.inputs)
        batch = {0: torch.export.Dim.DYNAMIC}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constants made while tracing; the file is compared
            program = torch.export.export(
                module, inputs, dynamic_shapes=(tuple(dict(batch) for _ in inputs),), strict=False
            )
            torch.export.save(program, path / FILE)

    def open(self, path: Path) -> Runner:
        file = path / FILE
        if not zipfile.is_zipfile(file):
            raise VerificationError(f"{file} is no torch.export program; copy or export it again")
        try:
            module = torch.export.load(file).module()
        except Exception as error:  # whatever a damaged archive makes torch raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise VerificationError(f"{file} cannot be loaded by torch: {said}") from error

        def run(inputs: Sequence[Tensor]) -> Outputs:
            with torch.inference_mode():
                outputs = module(*inputs)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return run

    def snippet(self, path: Path) -> str:
        return (
            "import torch\n"
            "from safetensors.torch import load_file\n"
            f"model = torch.export.load({str(path / FILE)!r}).module()\n"
            f"vectors = load_file({str(path / VECTORS)!r})\n"
            "outputs = model(*(vectors[k] for k in sorted(vectors) if k.startswith('input')))"
        )

    def expected(self, packed: PackedModel, inputs: Sequence[Tensor]) -> Outputs:
        """The reference without removed channels: half-step codes of absent columns count in
        the proven range of an output, so its unit may be smaller than that of the whole model."""
        program = lower(reduced_model(packed.model))
        values = run_torch(program, [x.numpy() for x in inputs]).values
        return [torch.as_tensor(value) for value in values]

    def promise(self, packed: PackedModel) -> Promise:
        program = lower(reduced_model(packed.model))
        if packed.model.candidate.activations and not program.float_islands:
            return Promise(0.0, self.exactness)
        return FLOATS
