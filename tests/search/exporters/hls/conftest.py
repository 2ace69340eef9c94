"""What the tests of the HLS target need."""

import shutil
from pathlib import Path

import pytest

from search.exporters.hls import project


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without hls4ml or a compiler only what needs neither can be tested."""
    if project.installed_version() != project.VERSION:
        reason = f"hls4ml {project.VERSION} (extra hls) is not installed"
    elif shutil.which("c++") is None:
        reason = "there is no C++ compiler"
    else:
        return
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents and "compiled" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
