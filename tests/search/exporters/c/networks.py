"""What the libraries of quantized networks compute, for the tests of the C target."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from search.exporters.c.compiler import LoadedLibrary, compile_c
from search.exporters.c.project import DESCRIPTION, expected, generate, vectors

Case = tuple[PackedModel, Sequence[Tensor]]


def assert_equal_to_referee(cases: Sequence[Case], folder: Path, *, levels: int = 3) -> None:
    """Every output integer of every case; one call of the compiler for all of them.

    levels: 3 for all kernels that the processor has, 1 for the portable ones alone, which compile
    in a fifth of the time.
    """
    descriptions = []
    for number, (packed, _) in enumerate(cases):
        library = generate(packed, f"n{number}")
        library.write(folder)
        descriptions.append(json.loads(library.files[DESCRIPTION]))
    shared = folder / "all.so"
    options = ["-O0", "-shared", "-fPIC"]  # -O1 takes three times as long
    if levels == 1:
        options.append("-DBITFRONT_PORTABLE")
    sources = [folder / f"n{number}.c" for number in range(len(cases))]
    compile_c(sources, shared, options)
    for number, (packed, inputs) in enumerate(cases):
        arrays = [x.numpy() for x in inputs]
        wanted = expected(lower(packed.model), arrays)
        for used in range(levels):
            got = LoadedLibrary(shared, descriptions[number], used).integers(arrays)
            for mine, theirs in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(mine, theirs, f"case {number}, level {used}")


def write_project(packed: PackedModel, inputs: Sequence[Tensor], folder: Path) -> None:
    """The folder as a user gets it, test vectors included."""
    generate(packed, "network").write(folder)
    arrays = [x.numpy() for x in inputs]
    wanted = expected(lower(packed.model), arrays)
    (folder / "vectors.bin").write_bytes(vectors(arrays, wanted))
