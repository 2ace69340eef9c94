"""Every deployment target by name. A module is imported only when its target is asked for."""

from importlib import import_module

from quant_ops.errors import UsageError
from search.exporters.base import Exporter

EXPORTERS = {
    "packed": "search.exporters.packed_file:PackedExporter",
    "c": "search.exporters.c.exporter:CExporter",
    "onnx": "search.exporters.onnx_runtime:OnnxExporter",
    "torch": "search.exporters.torch_program:TorchExporter",
    "verilog": "search.exporters.verilog:VerilogExporter",
    "hls": "search.exporters.hls.exporter:HLSExporter",
}


def find_exporter(name: str) -> Exporter:
    """The exporter of a target.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in EXPORTERS:
        raise UsageError(f"--to must be one of {', '.join(EXPORTERS)}, got {name!r}")
    module, _, attribute = EXPORTERS[name].partition(":")
    found: type[Exporter] = getattr(import_module(module), attribute)
    return found()
