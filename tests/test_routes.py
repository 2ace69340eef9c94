"""The deployment routes of README, run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TASK = ROOT / "tests/search/tasks/my_task.py"
TOOLS = {"server": (), "device": ("cc", "make"), "logic": ("verilator", "yosys")}
SAYS = {"server": "classes [", "device": "first score", "logic": "equal to the reference"}


def snippets():
    """The folder that a route exports to, and the route."""
    section = (ROOT / "README.md").read_text().partition("## On the target\n")[2]
    blocks = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return {re.search(r"--out (\w+)", block)[1]: block for block in blocks}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a script where `search` and `python` are those of this checkout, RUN a finished run."""
    folder = tmp_path_factory.mktemp("routes")
    tools = folder / "bin"
    tools.mkdir()
    for name, command in (("search", "-m search"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "BITFRONT_CACHE": str(folder / "cache"),
        "RUN": str(folder / "wine"),
    }

    def run(script):
        return subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    made = run(
        f"search run --task {TASK}:make_task --budget 1kB --out $RUN "
        "--strategy uniform,rate-distortion --trials 12"
    )
    assert made.returncode == 0, made.stderr
    return run


def test_there_are_three_routes():
    assert list(snippets()) == list(TOOLS)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("name", TOOLS)
def test_route_runs_as_it_stands(name, shell):
    missing = [tool for tool in TOOLS[name] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if name == "logic":
        pytest.importorskip("da4ml", reason="da4ml (extra fpga) is not installed")
    done = shell(snippets()[name])
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
