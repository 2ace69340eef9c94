"""The folder of a generated library: sources, makefile, main, test vectors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant_ops.packed import PackedModel
from quant_ops.program import IntegerProgram
from quant_ops.reference import run_torch
from search.exporters.c.emit import Source, emit
from search.exporters.c.memory import ordered
from search.exporters.c.network import Network
from search.exporters.c.reduced import reduced_program
from search.exporters.c.translate import translate

TEMPLATES = files("search.exporters.c") / "templates"
KERNELS = ("bitfront_kernels.h", "bitfront_x86.h", "bitfront_avx2.h")
DESCRIPTION = "library.json"
Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class CLibrary:
    """A network as C text, before anything is written.

    Attributes:
        files: file name to text.
    """

    name: str
    network: Network
    source: Source
    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text)


def generate(packed: PackedModel, name: str = "network") -> CLibrary:
    """The C library of a packed model.

    Raises:
        UsageError: the network holds an operator that the target cannot express.
    """
    network = ordered(translate(reduced_program(packed.model)))
    source = emit(network, name)
    texts = {
        f"{name}.h": source.header,
        f"{name}.c": source.code,
        "main.c": _main(network, name),
        "Makefile": _filled("Makefile.in", name),
        "README.md": _readme(network, source, name),
        DESCRIPTION: json.dumps(_description(network, source, name), indent=1) + "\n",
    }
    texts |= {kernel: (TEMPLATES / kernel).read_text() for kernel in KERNELS}
    return CLibrary(name, network, source, texts)


def _filled(template: str, name: str) -> str:
    return (TEMPLATES / template).read_text().replace("@NAME@", name)


def _main(network: Network, name: str) -> str:
    quantize, at = [], 0
    for number, value in enumerate(network.inputs):
        quantize.append(f"    {name}_quantize_input_{number}(inputs + {at});")
        at += value.n
    collect = [
        f"    for (int32_t i = 0; i < {value.n}; i++) got[at++] = {name}_output_{number}()[i];"
        for number, value in enumerate(network.outputs)
    ]
    text = _filled("main.c.in", name)
    for key, filling in {
        "INPUT_FLOATS": str(at),
        "OUTPUT_INTS": str(sum(v.n for v in network.outputs)),
        "QUANTIZE": "\n".join(quantize),
        "COLLECT": "\n".join(collect),
    }.items():
        text = text.replace(f"@{key}@", filling)
    return text


def _description(network: Network, source: Source, name: str) -> dict[str, object]:
    """What a program must know to run the library."""
    return {
        "name": name,
        "inputs": [list(v.sizes) for v in network.inputs],
        "outputs": [
            {
                "sizes": list(v.sizes),
                "type": v.type,
                "scale": v.codes.scale,
                "zero_point": v.codes.zero_point,
            }
            for v in network.outputs
        ],
        "ram_bytes": source.ram_bytes,
        "x86_ram_bytes": source.x86_ram_bytes,
        "constant_bytes": source.constant_bytes,
    }


def _readme(network: Network, source: Source, name: str) -> str:
    rows = []
    for kind, values in (("input", network.inputs), ("output", network.outputs)):
        for number, value in enumerate(values):
            sizes, lies = (" x ".join(map(str, part)) for part in (value.sizes, value.lies))
            rows.append(
                f"| {kind} {number} | {sizes} | {lies} | {value.type}_t | "
                f"{value.codes.scale!r} | {value.codes.zero_point} |"
            )
    text = _filled("README.md.in", name)
    for key, filling in {
        "VALUES": "\n".join(rows),
        "RAM": f"{source.ram_bytes:,}",
        "X86_RAM": f"{source.x86_ram_bytes:,}",
        "CONSTANTS": f"{source.constant_bytes:,}",
    }.items():
        text = text.replace(f"@{key}@", filling)
    return text


def vectors(inputs: Sequence[Array], outputs: Sequence[Array]) -> bytes:
    """The content of vectors.bin: an int32 count, then for each sample inputs and outputs."""
    n = len(inputs[0])
    rows = [x.reshape(n, -1).astype("<f4").view(np.uint8) for x in inputs]
    rows += [y.reshape(n, -1).astype("<i4").view(np.uint8) for y in outputs]
    return np.int32(n).tobytes() + np.concatenate(rows, axis=1).tobytes()


def expected(program: IntegerProgram, inputs: Sequence[Array]) -> list[NDArray[np.int32]]:
    """The referee's output integers."""
    integers = run_torch(program, inputs).integers
    out = []
    for value in integers:
        assert value is not None
        out.append(value)
    return out
