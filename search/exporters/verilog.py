"""Verilog of a small network, fully unrolled: one sample a clock, or no clock at all."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cost_models.fpga.adders import ADDERS_PER_STAGE
from quant_ops.errors import VerificationError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from search.exporters.base import Companions, Exporter, Outputs, Refusal, Runner
from search.exporters.ports import port_of, port_to_json
from search.exporters.simulation import Bus, Simulator
from search.exporters.unrolled import Unrolled, refusals, unroll

TOP = "network"
PORTS = "ports.json"
WIDE_LITERAL = re.compile(r"= 'b([01]{32,})")  # without a size they hold 32 bits
LICENCE = (
    "The files in rtl/static/ are parts of da4ml (LGPL-3.0-or-later, https://github.com/calad0i/"
    "da4ml), which also laid out the adders of rtl/network*.v."
)


class VerilogExporter(Exporter):
    """A folder with the logic, a test bench, and what the bits of its ports mean."""

    name = "verilog"
    summary = "fully unrolled logic for an FPGA, through da4ml; small networks"
    exactness = "every integer equals the code-domain reference's"
    needs_integers = True
    is_simulated = True

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        return refusals(lower(packed.model), packed.model.graph)

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        found = unroll(lower(packed.model), packed.model.graph)
        stages = _write_logic(found, path)
        inputs, outputs = (_bus(q) for q in (found.logic.inp_qint, found.logic.out_qint))
        ports = {
            "format": "bitfront-verilog",
            "version": 1,
            "stages": stages,
            "adder_cost": float(found.logic.cost),
            "input_bits": inputs.to_json(),
            "output_bits": outputs.to_json(),
            "inputs": [port_to_json(port) for port in found.inputs],
            "outputs": [port_to_json(port) for port in found.outputs],
        }
        (path / PORTS).write_text(json.dumps(ports, indent=1) + "\n")
        (path / "bench.v").write_text(_bench(inputs, outputs, stages))
        (path / "README.md").write_text(_readme(stages))

    def open(self, path: Path) -> Runner:
        try:
            ports = json.loads((path / PORTS).read_text())
            inputs, outputs = ([port_of(p) for p in ports[k]] for k in ("inputs", "outputs"))
            buses = (Bus.of(ports["input_bits"]), Bus.of(ports["output_bits"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VerificationError(
                f"{path / PORTS} does not describe the ports of a network ({error}); "
                f"export it again"
            ) from error
        simulator = Simulator(path, *buses)

        def run(given: Sequence[torch.Tensor]) -> Outputs:
            n = len(given[0])
            codes = [
                port.codes.quantize(x.numpy()).reshape(n, -1)
                for port, x in zip(inputs, given, strict=True)
            ]
            words = simulator.run(np.concatenate(codes, axis=1))
            ends = np.cumsum([port.n_words for port in outputs])[:-1]
            parts = zip(outputs, np.split(words, ends, axis=1), strict=True)
            return tuple(torch.from_numpy(port.values(part)) for port, part in parts)

        return run

    def snippet(self, path: Path) -> str:
        return (
            "from pathlib import Path\n"
            "from search.exporters.verilog import VerilogExporter\n"
            f"outputs = VerilogExporter().open(Path({str(path)!r}))(inputs)  # Verilator runs it"
        )

    def facts(
        self, packed: PackedModel, path: Path, inputs: Sequence[torch.Tensor]
    ) -> Mapping[str, Any]:
        ports = json.loads((path / PORTS).read_text())
        return {
            "adder_cost_da4ml": round(ports["adder_cost"]),
            "pipeline_stages": ports["stages"],
        }


def _write_logic(found: Unrolled, path: Path) -> int:
    """The project as da4ml writes it, of which the sources are kept; the number of stages."""
    from da4ml.codegen import RTLModel
    from da4ml.trace.pipeline import to_pipeline

    pipeline = to_pipeline(found.logic, ADDERS_PER_STAGE, verbose=False)
    project = path / "project"
    RTLModel(pipeline, TOP, project).write()
    shutil.move(project / "src", path / "rtl")
    shutil.rmtree(project)
    unused = [*(path / "rtl").glob(f"{TOP}.*dc"), *(path / "rtl").rglob("lookup_table.v")]
    for file in (path / "rtl" / f"{TOP}_wrapper.v", *unused):
        file.unlink()
    for source in (path / "rtl").rglob("*.v"):
        # older Verilators do not know the name of the narrower warning
        text = source.read_text().replace("WIDTHTRUNC", "WIDTH")
        source.write_text(WIDE_LITERAL.sub(lambda found: f"= {len(found[1])}'b{found[1]}", text))
    return len(pipeline.solutions)


def _bus(intervals: Sequence[Any]) -> Bus:
    from da4ml.types import minimal_kif

    kinds = [minimal_kif(q) for q in intervals]
    return Bus(
        tuple(int(k) + int(i) + int(f) for k, i, f in kinds),
        tuple(bool(k) for k, _, _ in kinds),
        tuple(-int(f) for _, _, f in kinds),
    )


def _bench(inputs: Bus, outputs: Bus, stages: int) -> str:
    text = (Path(__file__).parent / "bench.v").read_text()
    for name, number in {
        "INPUT_BITS": inputs.n_bits,
        "OUTPUT_BITS": outputs.n_bits,
        "STAGES": stages,
    }.items():
        text = text.replace(f"@{name}@", str(number))
    return text


def _readme(stages: int) -> str:
    return f"""# {TOP}

Unrolled logic: one sample enters each clock, its result leaves {stages} clocks later.

- `rtl/{TOP}.v` is the top module: `clk`, `model_inp`, `model_out`; the other files are its parts.
- `{PORTS}` says which bits hold which integer (`bits` from the lowest, two's complement where
  `signed`), how inputs become integers (round-half-even(x / scale) + zero point, saturated) and
  what outputs mean. An output with a `rescale` is a sum; its score is
  clamp(((sum * multiplier + offset) >> shift) + zero point), times the scale.
- `bench.v` reads one sample a line in hexadecimal from +inputs=FILE and writes +outputs=FILE.

    verilator --binary --timing -Wno-fatal --top bench -Irtl/static bench.v rtl/*.v rtl/static/*.v
    yosys -p "read_verilog rtl/static/*.v rtl/{TOP}*.v; hierarchy -top {TOP}; proc; opt_expr; \\
      opt_clean; alumacc; synth_xilinx -family xc7 -nodsp -noiopad -noclkbuf -flatten \\
      -top {TOP}; stat"

{LICENCE}
"""
