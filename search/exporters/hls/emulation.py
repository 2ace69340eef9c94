"""Runs HLS C++ here: hls4ml's bit-exact arithmetic types, compiled by an ordinary C++ compiler."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant_ops.errors import EnvironmentFault, VerificationError
from quant_ops.requantize import Integers
from search.exporters.hls.project import TOP

SECONDS = 1800  # of one compilation


def find_compiler() -> list[str]:
    """The C++ compiler: the variable CXX, or the first of c++, g++, clang++.

    Raises:
        EnvironmentFault: there is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise EnvironmentFault(
        f"no C++ compiler was found ({asked or 'c++, g++, clang++'}), and it runs the exported "
        f"HLS; install one (Debian: apt-get install g++) or set CXX"
    )


class Emulator:
    """The project in `folder`, compiled once; the library lies in a temporary folder.

    Args:
        folder: with firmware/ and the bridge.
        inputs, outputs: how many integers each takes and gives.

    Raises:
        EnvironmentFault: there is no compiler.
        VerificationError: it cannot compile what lies there.
    """

    def __init__(self, folder: Path, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        build = Path(tempfile.mkdtemp(prefix="bitfront-hls-"))
        weakref.finalize(self, shutil.rmtree, build, ignore_errors=True)
        shared = build / "network.so"
        command = [
            *find_compiler(), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{folder}",
            f"-I{folder / 'firmware/ap_types'}", str(folder / "firmware" / f"{TOP}.cpp"),
            str(folder / f"{TOP}_bridge.cpp"), "-o", str(shared),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            said = next((line for line in lines if "error" in line), lines[0])
            raise VerificationError(
                f"{folder} does not compile with {command[0]}: {said.strip()}; export it again"
            )
        self._run = ctypes.CDLL(str(shared))[f"{TOP}_double"]
        self._run.restype = None

    def run(self, batch: Sequence[Integers]) -> list[Integers]:
        """For each input (n, integers) to the same for each output."""
        n = len(batch[0])
        given = [np.ascontiguousarray(x, np.float64).reshape(n, -1) for x in batch]
        if tuple(x.shape[1] for x in given) != self._inputs:
            raise VerificationError(f"the network takes {self._inputs} integers a sample")
        out: list[NDArray[np.float64]] = [np.zeros((n, size)) for size in self._outputs]
        for sample in range(n):
            places = [x[sample].ctypes.data for x in (*given, *out)]
            self._run(*(ctypes.c_void_p(place) for place in places))
        return [x.astype(np.int64) for x in out]
