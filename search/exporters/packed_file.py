"""The packed file itself: bitfront's own runtime reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_ops.packed import PackedModel
from search.exporters.base import Companions, Exporter, Refusal, Runner
from search.vectors import TOLERANCE, run_packed


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
            f"outputs = PackedModel.load({str(path)!r})(*inputs)"
        )

    def facts(self, packed: PackedModel, path: Path) -> Mapping[str, Any]:
        return {
            "size_bytes": path.stat().st_size,
            "digest": packed.digest,
            "codec": packed.codec,
        }
