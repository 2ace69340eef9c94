"""Synthesize layers with yosys, and fit LUTs and registers to features of their codes.

python -m studies.fpga.calibrate --family xc7          # goes on where it stopped
python -m studies.fpga.calibrate --family xc7 --fit    # coefficients and held-out errors
"""

import argparse
import base64
import csv
import json
import subprocess
import time
import zlib
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.fpga.circuit import Circuit, Features, total
from cost_models.fpga.rescaling import Fixed
from cost_models.fpga.synthesis import (
    YOSYS_FAMILIES,
    agrees,
    pipelined,
    require_tools,
    synthesize,
    traced,
)
from quant_ops.errors import EnvironmentFault, VerificationError
from studies.fpga.cases import Case, cases

HERE = Path(__file__).parent
COLUMNS = (
    "name", "kind", "split", "source", "inputs", "outputs", "weight_bits", "input_bits", "zeros",
    "lut", "ff", "stages", "da4ml_lut", "da4ml_ff", "seconds", "yosys", "da4ml", "circuits",
)  # fmt: skip
TIMEOUT_S = 400.0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=YOSYS_FAMILIES, default="xc7")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop before a case after this")
    options = parser.parse_args()
    if options.fit:
        from studies.fpga.fit import fit

        fit(options.family, read_rows(options.family))
        return
    require_tools()
    deadline = time.monotonic() + 60 * options.minutes
    done = {row["name"] for row in read_rows(options.family)}
    for case in cases():
        if case.name in done:
            continue
        if time.monotonic() > deadline:
            break
        try:
            row = measure(case, options.family)
        except EnvironmentFault as error:
            print(case.name, error, flush=True)
            continue
        append(options.family, row)
        print(case.name, row["lut"], row["ff"], f"{row['seconds']:.0f} s", flush=True)


def measure(case: Case, family: str) -> dict[str, Any]:
    """One row: what da4ml and yosys say of a case whose circuit computes what it should."""
    logic = traced(case.circuits)
    first = case.circuits[0]
    if not agrees(logic, case.circuits):
        raise VerificationError(f"da4ml's circuit of {case.name} computes something else")
    pipeline, adders = pipelined(logic)
    cells = synthesize(pipeline, family, timeout_s=TIMEOUT_S)
    return {
        "name": case.name, "kind": case.kind, "split": case.split, "source": case.source,
        "inputs": first.weights.shape[1], "outputs": case.circuits[-1].weights.shape[0],
        "weight_bits": case.weight_bits, "input_bits": case.input_bits, "zeros": case.zeros,
        "lut": cells.lut, "ff": cells.ff, "stages": adders.stages,
        "da4ml_lut": adders.lut, "da4ml_ff": adders.ff, "seconds": round(cells.seconds, 1),
        "yosys": yosys_version(), "da4ml": metadata.version("da4ml"),
        "circuits": pack(case.circuits),
    }  # fmt: skip


def pack(circuits: tuple[Circuit, ...]) -> str:
    """All integers of some circuits as one word."""
    parts = [
        [
            c.weights.tolist(),
            c.low,
            c.high,
            [[r.multiplier, r.offset, r.shift, r.low, r.high] for r in c.rescales],
        ]
        for c in circuits
    ]
    text = json.dumps(parts, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(word: str) -> tuple[Circuit, ...]:
    """Inverse of `pack`."""
    parts = json.loads(zlib.decompress(base64.b64decode(word)))
    return tuple(
        Circuit(np.array(weights, np.int64), low, high, tuple(Fixed(*r) for r in rescales))
        for weights, low, high, rescales in parts
    )


def features_of(row: dict[str, str]) -> Features:
    """Features of a row's circuits, without outputs that are constant or that nobody reads."""
    return total([circuit.features for circuit in kept_chain(unpack(row["circuits"]))])


def kept_chain(circuits: Sequence[Circuit]) -> list[Circuit]:
    """Layers that follow each other as a synthesizer keeps them, looked at in pairs."""
    out = []
    for at, circuit in enumerate(circuits):
        dead_inputs, dead_outputs = np.zeros(circuit.weights.shape[1], np.bool_), circuit.constant
        if at:
            dead_inputs = circuits[at - 1].constant
        if at + 1 < len(circuits):
            dead_outputs = dead_outputs | ~circuits[at + 1].weights.any(axis=0)
        out.append(circuit.without(dead_inputs, dead_outputs))
    return out


def rows_path(family: str) -> Path:
    """The kept rows of a family."""
    return HERE / f"{family}.csv"


def read_rows(family: str) -> list[dict[str, str]]:
    """The kept rows of a family, none if there are none."""
    path = rows_path(family)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(family: str, row: dict[str, Any]) -> None:
    """Keep one more row."""
    path = rows_path(family)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def yosys_version() -> str:
    """As yosys states it."""
    text = subprocess.run(["yosys", "-V"], capture_output=True, text=True, check=True).stdout
    return text.split()[1]


def today() -> str:
    """The date of a fit."""
    return date.today().isoformat()


if __name__ == "__main__":
    main()
