"""The packed file itself: bitfront's own runtime reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_ops.packed import PackedModel
from search.exporters.base import Companions, Exporter, Refusal, Runner
from search.vectors import TOLERANCE, run_packed, vectors_path


class PackedExporter(Exporter):
    """One safetensors file with every weight at its own width."""

    name = "packed"
    summary = "the packed file, for bitfront's own runtime"
    exactness = "integers are equal on every machine, float operators to the last digits"
    is_file = True
    tolerance = TOLERANCE

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        return ()

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        packed.save(path)

    def open(self, path: Path) -> Runner:
        packed = PackedModel.load(path)
        return lambda inputs: run_packed(packed, tuple(inputs))

    def snippet(self, path: Path) -> str:
        return (
            "from quant_ops.packed import PackedModel\n"
            "from safetensors.torch import load_file\n"
            f"model = PackedModel.load({str(path)!r})\n"
            f"vectors = load_file({str(vectors_path(path))!r})\n"
            "outputs = model(vectors['input.0'])"
        )

    def facts(self, packed: PackedModel, path: Path, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
        return {
            "size_bytes": path.stat().st_size,
            "digest": packed.digest,
            "codec": packed.codec,
        }
