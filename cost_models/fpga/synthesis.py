"""Circuits as Verilog through da4ml, and what yosys makes of it: never a figure of Vivado."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.fpga.adders import ADDERS_PER_STAGE
from cost_models.fpga.circuit import Circuit
from cost_models.fpga.symbols import clamped_floor, within
from quant_ops.errors import EnvironmentFault

YOSYS_FAMILIES = ("xc7", "xcup")
_TOP = "circuit"
_INTERPRETER_BITS = 31
# One adder per module, mapped before it is flattened: yosys otherwise merges chains of additions
# into compressors, which takes twice the LUTs.
_FLOW = """read_verilog {files}
hierarchy -top {top}
proc
opt_expr
opt_clean
alumacc
synth_xilinx -family {family} -nodsp -nosrl -noiopad -noclkbuf -flatten -top {top}
tee -q -o stat.json stat -json
"""


@dataclass(frozen=True, slots=True)
class Adders:
    """What da4ml says of a circuit: adder bits, register bits, pipeline stages."""

    lut: float
    ff: float
    stages: int


@dataclass(frozen=True, slots=True)
class Synthesized:
    """Cells that yosys counted, and the seconds it took."""

    lut: int
    ff: int
    seconds: float


def missing_tools() -> list[str]:
    """What a measurement needs and this machine lacks, each with how to install it."""
    missing = []
    if shutil.which("yosys") is None:
        missing.append("yosys (apt-get install yosys)")
    try:
        import da4ml  # noqa: F401
    except ImportError:
        missing.append("da4ml (pip install 'bitfront[fpga]')")
    return missing


def require_tools() -> None:
    """Refuse to measure without the tools.

    Raises:
        EnvironmentFault: names what is missing and how to install it.
    """
    missing = missing_tools()
    if missing:
        raise EnvironmentFault(
            f"an FPGA measurement needs {' and '.join(missing)}; the fitted model of `search run "
            f"--budget lut=...` works without"
        )


def traced(circuits: Sequence[Circuit]) -> Any:
    """da4ml's combinational logic of circuits that follow each other."""
    from da4ml.trace import FixedVariableArray, comb_trace

    n = circuits[0].weights.shape[1]
    low, high = circuits[0].low, circuits[0].high
    inputs = FixedVariableArray.from_lhs(
        np.full(n, float(low)), np.full(n, float(high)), np.ones(n)
    )
    values: Any = inputs
    for circuit in circuits:
        values = values @ circuit.weights.T.astype(np.float64)
        if circuit.rescales:
            sums = [within(v, *ends) for v, *ends in zip(values, *circuit.ranges, strict=True)]
            pairs = zip(circuit.rescales, sums, strict=True)
            values = FixedVariableArray([clamped_floor(r.narrow, [v]) for r, v in pairs])
    return comb_trace(inputs, values)


def agrees(logic: Any, circuits: Sequence[Circuit]) -> bool:
    """Whether da4ml's logic gives the integers of the circuits, on random codes.

    Its interpreter holds 32 bits; what is wider is evaluated operation by operation, a few times.
    """
    from da4ml.types import minimal_kif

    first = circuits[0]
    is_wide = max(sum(minimal_kif(op.qint)) for op in logic.ops) > _INTERPRETER_BITS
    n = 8 if is_wide else 500
    rng = np.random.default_rng(0)
    codes = rng.integers(first.low, first.high + 1, (n, first.weights.shape[1]))
    wanted = codes
    for circuit in circuits:
        wanted = circuit.run(wanted)
    values = codes.astype(np.float64)
    found = [logic(row) for row in values] if is_wide else logic.predict(values)
    return np.array_equal(np.asarray(found, np.float64), wanted)


def pipelined(logic: Any) -> tuple[Any, Adders]:
    """da4ml's pipeline of a combinational logic, and what it costs."""
    from da4ml.trace import to_pipeline

    pipeline = to_pipeline(logic, ADDERS_PER_STAGE, verbose=False)
    stages = len(pipeline.solutions)
    return pipeline, Adders(float(pipeline.cost), float(pipeline.reg_bits), stages)


def synthesize(pipeline: Any, family: str, *, timeout_s: float = 600.0) -> Synthesized:
    """Write a pipeline as Verilog, map it with yosys and count the cells.

    Raises:
        EnvironmentFault: yosys is absent, failed, or took too long.
    """
    from da4ml.codegen.rtl.rtl_model import RTLModel

    require_tools()
    with tempfile.TemporaryDirectory(prefix="bitfront-fpga-") as folder:
        path = Path(folder)
        RTLModel(pipeline, _TOP, path, print_latency=False).write()
        sources = [*path.glob(f"src/{_TOP}*.v"), *path.glob("src/static/*.v")]
        names = [f for f in sources if "wrapper" not in f.name and f.name != "lookup_table.v"]
        script = _FLOW.format(files=" ".join(map(str, names)), top=_TOP, family=family)
        (path / "flow.ys").write_text(script)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                ["yosys", "-q", "flow.ys"],
                cwd=path, timeout=timeout_s, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EnvironmentFault(
                f"yosys did not finish in {timeout_s:.0f} s; measure a smaller network"
            ) from None
        if done.returncode:
            raise EnvironmentFault(f"yosys failed: {done.stderr.strip()[-400:]}")
        text = (path / "stat.json").read_text()
        cells = json.loads(text[text.index("{") :])["design"]["num_cells_by_type"]
    return Synthesized(
        lut=sum(n for kind, n in cells.items() if re.fullmatch(r"LUT\d", kind)),
        ff=sum(n for kind, n in cells.items() if kind.startswith("FD")),
        seconds=time.perf_counter() - started,
    )
