"""A C99 library without dependencies, compiled and compared before it is handed over."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_ops.errors import UsageError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from search.budget import format_size
from search.exporters.base import Companions, Exporter, Refusal, Runner
from search.exporters.c.compiler import compile_c, find_compiler, load_library, sections
from search.exporters.c.project import expected, generate, vectors
from search.exporters.c.translate import Inexpressible

NAME = "network"


class CExporter(Exporter):
    """C sources, makefile, a program that checks the test vectors, and a README."""

    name = "c"
    summary = "a dependency-free C99 library with integer arithmetic, for microcontrollers and x86"
    exactness = "every output integer equals the reference's"
    needs_integers = True

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        try:
            generate(packed, NAME)
        except Inexpressible as refused:
            return (refused.refusal,)
        return ()

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        find_compiler()
        generate(packed, NAME).write(path)
        inputs = [x.numpy() for x in companions.vectors.inputs]
        outputs = expected(lower(packed.model), inputs)
        (path / "vectors.bin").write_bytes(vectors(inputs, outputs))

    def open(self, path: Path) -> Runner:
        return load_library(path)

    def snippet(self, path: Path) -> str:
        return f"make -C {path} check"

    def facts(self, packed: PackedModel, path: Path, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
        source = generate(packed, NAME).source
        return {
            "packed_bytes": packed.size_bytes,
            "flash": _measured(path, source.ram_bytes, portable=True),
            "x86": _measured(path, source.x86_ram_bytes, portable=False),
        }


def _measured(path: Path, predicted_ram: int, *, portable: bool) -> str:
    """Sections of the object, and whether its static memory is what was predicted."""
    options = ["-c", "-Os", "-DBITFRONT_PORTABLE"] if portable else ["-c", "-O3"]
    with tempfile.TemporaryDirectory() as folder:
        obj = Path(folder) / "network.o"
        compile_c([path / f"{NAME}.c"], obj, options)
        found = sections(obj)
    if found is None:
        return f"static RAM {predicted_ram:,} bytes (predicted; `size` is not installed)"
    if found.ram != predicted_ram:
        raise UsageError(
            f"the object holds {found.ram:,} bytes of static memory where {predicted_ram:,} were "
            f"predicted; please report this"
        )
    return (
        f"constants {format_size(found.constants)}, code {format_size(found.code)}, static RAM "
        f"{found.ram:,} bytes as predicted ({' '.join(options[1:])})"
    )
