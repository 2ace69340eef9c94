"""An hls4ml project, emulated and compared before it is handed over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quant_ops.errors import VerificationError
from quant_ops.packed import PackedModel
from quant_ops.requantize import Integers
from search.exporters.base import Companions, Exporter, Outputs, Refusal, Runner
from search.exporters.c.reduced import reduced_program
from search.exporters.hls.emulation import Emulator, find_compiler
from search.exporters.hls.network import Inexpressible, Network, Wiring
from search.exporters.hls.project import require_hls4ml, write_project
from search.exporters.hls.translate import translate
from search.exporters.ports import port_of, port_to_json

PORTS = "ports.json"
FORMAT, VERSION = "bitfront-hls", 1


class HLSExporter(Exporter):
    """A folder with the project, and what the integers of its ports mean."""

    name = "hls"
    summary = "an hls4ml project (Vitis HLS C++) with a type for every layer; small networks"
    exactness = "every integer equals the code-domain reference's"
    needs_integers = True
    is_simulated = True

    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        try:
            _network(packed)
        except Inexpressible as refused:
            return (refused.refusal,)
        return ()

    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        require_hls4ml()
        find_compiler()
        network = _network(packed)
        write_project(network, path)
        ports = {
            "format": FORMAT,
            "version": VERSION,
            "inputs": [_wiring_to_json(wiring) for _, wiring in network.inputs],
            "outputs": [_wiring_to_json(wiring) for _, wiring in network.outputs],
        }
        (path / PORTS).write_text(json.dumps(ports, indent=1) + "\n")
        (path / "README.md").write_text(_readme(network))

    def open(self, path: Path) -> Runner:
        try:
            ports = json.loads((path / PORTS).read_text())
            assert (ports["format"], ports["version"]) == (FORMAT, VERSION)
            inputs, outputs = ([_wiring_of(w) for w in ports[k]] for k in ("inputs", "outputs"))
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise VerificationError(
                f"{path / PORTS} does not describe the ports of a network ({error}); "
                f"export it again"
            ) from error
        sizes = ([wiring.places.size for wiring in side] for side in (inputs, outputs))
        emulator = Emulator(path, *sizes)

        def run(given: Sequence[torch.Tensor]) -> Outputs:
            batch = []
            for wiring, x in zip(inputs, given, strict=True):
                codes = wiring.port.codes.quantize(x.numpy()).reshape(len(x), -1)
                laid = np.zeros_like(codes)
                laid[:, wiring.places] = codes
                batch.append(laid)
            found = zip(outputs, emulator.run(batch), strict=True)
            return tuple(torch.from_numpy(w.port.values(words[:, w.places])) for w, words in found)

        return run

    def snippet(self, path: Path) -> str:
        return (
            "from pathlib import Path\n"
            "from search.exporters.hls.exporter import HLSExporter\n"
            f"outputs = HLSExporter().open(Path({str(path)!r}))(inputs)  # hls4ml's C++ emulation"
        )

    def facts(
        self, packed: PackedModel, path: Path, inputs: Sequence[torch.Tensor]
    ) -> Mapping[str, Any]:
        return {"layers_of_hls4ml": len(_network(packed).blocks)}


def _network(packed: PackedModel) -> Network:
    """hls4ml fails on channels of width 0, so removed ones are left out before it sees them."""
    reduced = reduced_program(packed.model)
    return translate(reduced.program, reduced.graph)


def _wiring_to_json(wiring: Wiring) -> dict[str, Any]:
    return {**port_to_json(wiring.port), "places": wiring.places.reshape(-1).tolist()}


def _wiring_of(value: Mapping[str, Any]) -> Wiring:
    port = port_of(value)
    places: Integers = np.array(value["places"], np.int64)
    if sorted(places.tolist()) != list(range(port.n_words)):
        raise ValueError("places are no permutation")
    return Wiring(port, places)


def _readme(network: Network) -> str:
    rows = "\n".join(
        f"| `{block.name}` | {block.kind} | {block.origin or 'output'} | "
        f"{', '.join(f'{kind} {fixed}' for kind, fixed in block.precision.items())} |"
        for block in network.blocks
    )
    return f"""# network

An hls4ml project, one sample a call, every product laid out (io_parallel, reuse factor 1).

- `firmware/network.cpp` is the top function; `vitis_hls -f build_prj.tcl` synthesizes it.
- `{PORTS}` says what its integers mean: an input's are round-half-even(x / scale) + zero point,
  saturated (`codes`: scale, zero point, smallest, largest). Element i of a sample lies at
  `places`[i]. An output with a `rescale` is a sum; its score is
  clamp(((sum * multiplier + offset) >> shift) + zero point), times the scale.
- `network_bridge.cpp` runs it with an ordinary compiler:

    g++ -std=c++17 -O1 -fPIC -shared -I. -Ifirmware/ap_types firmware/network.cpp \\
      network_bridge.cpp -o network.so      # network_double(inputs..., outputs...)

A type `fixed<width,integer bits,TRN,SAT>` rounds down and saturates: this is how sums become codes.

| layer | kind | computes | types |
|---|---|---|---|
{rows}

A `Gather` is wires (`nnet_gather.h`): each integer it writes is one that it reads, or 0.

`firmware/nnet_utils/` but `nnet_gather.h`, `firmware/ap_types/` and the scripts are parts of hls4ml
(Apache-2.0, https://github.com/fastmachinelearning/hls4ml), which also wrote the code in
`firmware/network.cpp`.
"""
