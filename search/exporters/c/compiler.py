"""Compiling a generated library here, and running it."""

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.errors import EnvironmentFault, VerificationError
from search.exporters.c.project import DESCRIPTION

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
_LONGEST = 300  # seconds of one compilation


def find_compiler() -> str:
    """The C compiler: the variable CC, or the first of cc, gcc, clang.

    Raises:
        EnvironmentFault: there is none.
    """
    asked = os.environ.get("CC")
    for name in (asked,) if asked else ("cc", "gcc", "clang"):
        found = shutil.which(shlex.split(name)[0])
        if found:
            return name
    raise EnvironmentFault(
        f"no C compiler was found ({asked or 'cc, gcc, clang'}), and an export is handed over only "
        f"after it has run; install one (Debian: apt install gcc) or set CC"
    )


def compile_c(sources: Sequence[Path], out: Path, options: Sequence[str]) -> None:
    """Compile with all warnings as errors.

    Raises:
        EnvironmentFault: there is no compiler.
        VerificationError: the source does not compile.
    """
    command = [
        *shlex.split(find_compiler()), *WARNINGS, *options, "-o", str(out),
        *(str(source) for source in sources),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise VerificationError(
            f"{sources[0]} does not compile with {command[0]}: "
            f"{(done.stderr.strip() or 'no message').splitlines()[0]}; export the model again"
        )


@dataclass(frozen=True, slots=True)
class Sections:
    """Bytes of an object file: code, constant data, static memory."""

    code: int
    constants: int
    ram: int


def sections(obj: Path, size_tool: str = "size") -> Sections | None:
    """What `size` says of an object file; None where the tool is absent."""
    if shutil.which(size_tool) is None:
        return None
    done = subprocess.run(
        [size_tool, "-A", "-d", str(obj)], capture_output=True, text=True, check=False
    )
    sums = dict.fromkeys(("text", "rodata", "bss", "data"), 0)
    for line in done.stdout.splitlines():
        name, *numbers = line.split() or [""]
        kind = name.split(".")[1] if name.startswith(".") else ""
        if name.startswith(".data.rel.ro"):  # addresses that the loader fills in, constant then
            kind = "rodata"
        if kind in sums:
            sums[kind] += int(numbers[0])
    return Sections(sums["text"], sums["rodata"], sums["bss"] + sums["data"])


def load_library(folder: Path) -> "LoadedLibrary":
    """Compile the library in `folder` into a temporary one, and load it.

    Raises:
        VerificationError: it is not a library of this program, or does not compile.
        EnvironmentFault: there is no compiler.
    """
    facts = _described(folder)
    build = Path(tempfile.mkdtemp(prefix="bitfront-c-"))
    shared = build / "library.so"
    try:
        compile_c([folder / f"{facts['name']}.c"], shared, ("-O3", "-shared", "-fPIC"))
        library = LoadedLibrary(shared, facts)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
    weakref.finalize(library, shutil.rmtree, build, ignore_errors=True)
    return library


class LoadedLibrary:
    """A generated library in this process; `level` says which kernels it uses."""

    def __init__(self, shared: Path, facts: Mapping[str, Any], level: int = 9) -> None:
        """Load the library that `facts` (of library.json) describe from a shared object.

        Args:
            shared: the shared object.
            facts: name, inputs, outputs.
            level: of the kernels, at most: 0 portable, 1 AVX2, 2 AVX-512 VNNI.
        """
        self.facts = facts
        name = facts["name"]
        self._library = ctypes.CDLL(str(shared))
        self._functions = self._bind(name)
        self.level = int(self._library[f"{name}_init"](level))

    def _bind(self, name: str) -> tuple[Any, list[Any], list[Any]]:
        run = self._library[f"{name}_run"]
        run.restype = None
        puts, gets = [], []
        for i in range(len(self.facts["inputs"])):
            put = self._library[f"{name}_quantize_input_{i}"]
            put.restype, put.argtypes = None, [ctypes.c_void_p]
            puts.append(put)
        for i, output in enumerate(self.facts["outputs"]):
            get = self._library[f"{name}_output_{i}"]
            code = getattr(ctypes, f"c_{output['type']}")
            get.restype = ctypes.POINTER(code * int(np.prod(output["sizes"], dtype=np.int64)))
            gets.append(get)
        return run, puts, gets

    def infer(self, addresses: Sequence[int]) -> None:
        """One sample, without its outputs: float32 inputs lie at `addresses`."""
        run, puts, _ = self._functions
        for put, address in zip(puts, addresses, strict=True):
            put(address)
        run()

    def integers(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[np.int32]]:
        """Output codes of a batch."""
        gets = self._functions[2]
        batch = [np.ascontiguousarray(x, np.float32) for x in inputs]
        sizes = [list(x.shape[1:]) for x in batch]
        if sizes != self.facts["inputs"]:
            raise VerificationError(
                f"the library takes inputs of shape {self.facts['inputs']}, {sizes} were given"
            )
        out = [np.empty((len(batch[0]), *o["sizes"]), np.int32) for o in self.facts["outputs"]]
        for sample in range(len(batch[0])):
            self.infer([x[sample].ctypes.data for x in batch])
            for get, codes in zip(gets, out, strict=True):
                codes[sample].reshape(-1)[:] = np.ctypeslib.as_array(get().contents)
        return out

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Output values of a batch: scale times (code - zero point), as the referee gives them."""
        values = []
        integers = self.integers([x.numpy() for x in inputs])
        for codes, output in zip(integers, self.facts["outputs"], strict=True):
            steps = (codes.astype(np.int64) - output["zero_point"]).astype(np.float32)
            values.append(torch.from_numpy(steps * np.float32(output["scale"])))
        return values


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        name = facts["name"]
        assert isinstance(name, str)
        assert name.isidentifier()
        for sizes in (*facts["inputs"], *(o["sizes"] for o in facts["outputs"])):
            assert all(isinstance(n, int) and 0 < n < 2**24 for n in sizes)
            assert np.prod(sizes, dtype=np.float64) < 2**28
        for output in facts["outputs"]:
            assert output["type"] in ("uint8", "int8", "uint16", "int16", "int32")
            assert float(output["scale"]) > 0
            assert isinstance(output["zero_point"], int)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise VerificationError(
            f"{path} does not describe a generated C library; export the model again"
        ) from error
    return dict(facts)
