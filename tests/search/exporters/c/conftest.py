"""What the tests of the C target need."""

import shutil
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a compiler only what needs none can be tested."""
    if any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return
    skip = pytest.mark.skip(reason="no C compiler is installed")
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents and "compiled" in item.keywords:
            item.add_marker(skip)
