"""What the tests of the C target share."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "c_networks", Path(__file__).with_name("networks.py")
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["c_networks"] = _module
_spec.loader.exec_module(_module)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a compiler only what needs none can be tested."""
    if any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return
    skip = pytest.mark.skip(reason="no C compiler is installed")
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents and "compiled" in item.keywords:
            item.add_marker(skip)
