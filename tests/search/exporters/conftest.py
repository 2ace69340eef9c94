"""What the tests of the targets share: networks, and what C makes of them."""

import importlib.util
import sys
from pathlib import Path


def _load(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("small_networks", Path(__file__).with_name("networks.py"))
_load("c_networks", Path(__file__).parent / "c" / "networks.py")
