"""Runs a Verilog test bench: integers to bits, Verilator, bits to integers."""

import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quant_ops.errors import EnvironmentFault, VerificationError

BUILD_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Bus:
    """Integers side by side in one port, the first in the lowest bits, two's complement.

    Attributes:
        bits: of each integer, 0 for one that is always 0.
        signed: whether its highest bit is a sign.
        shifts: how many low bits, always 0, are absent.
    """

    bits: tuple[int, ...]
    signed: tuple[bool, ...]
    shifts: tuple[int, ...]

    @property
    def n_bits(self) -> int:
        """Of the whole port."""
        return sum(self.bits)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {name: list(getattr(self, name)) for name in ("bits", "signed", "shifts")}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        bits, shifts = (tuple(int(x) for x in value[name]) for name in ("bits", "shifts"))
        return cls(bits, tuple(bool(x) for x in value["signed"]), shifts)

    def to_lines(self, integers: NDArray[np.integer]) -> str:
        """(n, integers) as n lines of hexadecimal."""
        digits = max(1, -(-self.n_bits // 4))
        lines = []
        for row in integers.tolist():
            word, at = 0, 0
            for value, bits, shift in zip(row, self.bits, self.shifts, strict=True):
                word |= ((value >> shift) & ((1 << bits) - 1)) << at
                at += bits
            lines.append(f"{word:0{digits}x}\n")
        return "".join(lines)

    def of_lines(self, text: str) -> NDArray[np.int64]:
        """Inverse of `to_lines`."""
        lines = text.split()
        out = np.zeros((len(lines), len(self.bits)), np.int64)
        for at, line in enumerate(lines):
            word = int(line, 16)
            for place, (bits, signed) in enumerate(zip(self.bits, self.signed, strict=True)):
                value = word & ((1 << bits) - 1)
                if signed and value >> (bits - 1):
                    value -= 1 << bits
                out[at, place] = value
                word >>= bits
        return out << np.array(self.shifts, np.int64)


class Simulator:
    """A test bench, compiled once by Verilator; the build lies in a temporary folder.

    Args:
        folder: with bench.v and rtl/.
        inputs, outputs: of the top module.

    Raises:
        EnvironmentFault: there is no Verilator.
        VerificationError: it cannot compile what lies there.
    """

    def __init__(self, folder: Path, inputs: Bus, outputs: Bus) -> None:
        verilator = shutil.which("verilator")
        if verilator is None:
            raise EnvironmentFault(
                "Verilator runs the exported logic and is not installed; apt-get install verilator"
            )
        self._inputs, self._outputs = inputs, outputs
        self._build = Path(tempfile.mkdtemp(prefix="bitfront-verilator-"))
        weakref.finalize(self, shutil.rmtree, self._build, ignore_errors=True)
        sources = [folder / "bench.v", *sorted((folder / "rtl").rglob("*.v"))]
        command = [
            verilator, "--binary", "--timing", "-Wno-fatal", "-Wno-lint", "-Wno-style",
            "--top", "bench", "-O3", "-CFLAGS", "-O1", "--Mdir", str(self._build),
            *(str(path.resolve()) for path in sources),
        ]  # fmt: skip
        self._run(command, "Verilator cannot compile", folder)

    def run(self, integers: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n, inputs) to (n, outputs).

        Raises:
            VerificationError: the simulation failed.
        """
        source, target = (self._build / name for name in ("in.hex", "out.hex"))
        source.write_text(self._inputs.to_lines(integers))
        program = self._build / "Vbench"
        self._run(
            [str(program), f"+inputs={source}", f"+outputs={target}"],
            "the simulation fails of",
            source,
        )
        out = self._outputs.of_lines(target.read_text())
        if len(out) != len(integers):
            raise VerificationError(
                f"the simulation gave {len(out)} results for {len(integers)} samples; export again"
            )
        return out

    def _run(self, command: list[str], what: str, where: Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            said = next((line for line in lines if "Error" in line), lines[-1])
            raise VerificationError(f"{what} {where}: {said.strip()}; export it again")
