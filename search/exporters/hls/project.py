"""hls4ml writes the project. Its front ends are not used: layers come as it holds them itself.

Every type is given, so that hls4ml infers and merges nothing.
"""

import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from quant_ops.errors import EnvironmentFault
from search.exporters.hls.gather import register_gather
from search.exporters.hls.network import Block, Network

VERSION = "1.3.0"
BACKEND, TOP = "Vitis", "network"
SCRIPTS = ("build_opt.tcl", "build_prj.tcl", "project.tcl")
PART, CLOCK_NS = "xcu250-figd2104-2L-e", 5


def installed_version() -> str | None:
    """Of hls4ml; None: it is not installed."""
    try:
        return metadata.version("hls4ml")
    except metadata.PackageNotFoundError:
        return None


def require_hls4ml() -> None:
    """Raise `EnvironmentFault` where there is no hls4ml, or another version."""
    found = installed_version()
    if found != VERSION:
        said = f"hls4ml {found} is installed" if found else "hls4ml is not installed"
        raise EnvironmentFault(
            f"{said}, and target 'hls' is written by hls4ml {VERSION}; pip install 'bitfront[hls]'"
        )


def write_project(network: Network, path: Path) -> None:
    """Sources, constants, hls4ml's headers and its build scripts, without a compiled library.

    Raises:
        EnvironmentFault: hls4ml is not there.
    """
    require_hls4ml()
    with tempfile.TemporaryDirectory() as scratch, _quietly():
        from hls4ml.backends import get_backend
        from hls4ml.model.graph import ModelGraph

        register_gather(BACKEND)
        folder = Path(scratch) / TOP
        config = get_backend(BACKEND).create_initial_config(
            part=PART, clock_period=CLOCK_NS, io_type="io_parallel", write_weights_txt=False
        )
        config |= {
            "OutputDir": str(folder),
            "ProjectName": TOP,
            "Backend": BACKEND,
            "Stamp": "bitfront",
            "HLSConfig": _settings(network),
        }
        names = [name for name, _ in network.inputs], [name for name, _ in network.outputs]
        layers = [_layer(block) for block in network.blocks]
        ModelGraph.from_layer_list(config, layers, *names).write()
        shutil.move(folder / "firmware", path / "firmware")
        for source in (f"{TOP}_bridge.cpp", f"{TOP}_test.cpp", *SCRIPTS):
            shutil.move(folder / source, path / source)


def _settings(network: Network) -> dict[str, Any]:
    layers = {
        block.name: {"Precision": {kind: str(fixed) for kind, fixed in block.precision.items()}}
        for block in network.blocks
    }
    return {
        "Model": {
            "Precision": "fixed<16,6>",
            "ReuseFactor": 1,
            "Strategy": "Latency",
            "BitExact": False,
        },
        "LayerName": layers,
    }


def _layer(block: Block) -> Mapping[str, Any]:
    layer = {"name": block.name, "class_name": block.kind, **block.attributes}
    if block.inputs:
        layer["inputs"] = list(block.inputs)
    return layer


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """hls4ml prints and warns about what it does."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
