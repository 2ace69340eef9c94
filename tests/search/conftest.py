"""A made-up front whose losses follow 4^-bits, and the command `search` to be called."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from quant_ops.candidate import Candidate
from search.budget import Budgets
from search.cli import main
from search.dominance import HypervolumeScale
from search.evaluation import Evaluation
from search.front import FrontInfo, ParetoFront

MadeUp = tuple[list[Evaluation], ParetoFront]


class Finished(NamedTuple):
    """What a command came back with."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def make_front() -> Callable[..., MadeUp]:
    def make(n_layers: int = 21, n_random: int = 40, seed: int = 0, **info: object) -> MadeUp:
        generator = np.random.default_rng(seed)
        names = [f"layer{i // 8}.{i}.conv" for i in range(n_layers - 1)] + ["fc"]
        evaluations: list[Evaluation] = []

        def add(widths: list[float], strategy: str) -> None:
            loss = float(np.mean(4.0 ** -np.array(widths))) * 8
            costs = {"size_bytes": float(300 * sum(widths) + 900), "bops": 1e6 * sum(widths)}
            candidate = Candidate.of(dict(zip(names, widths, strict=True)), {"relu": 8})
            evaluations.append(
                Evaluation(
                    candidate, loss, max(0.1, 0.92 - loss / 10), costs, loss / 30, 1 - loss / 10,
                    0.5, strategy, seed, trial=len(evaluations),
                    notes={"mean_weight_bits": float(np.mean(widths))},
                )
            )  # fmt: skip

        for width in (2, 3, 4, 5, 6, 7, 8):
            add([float(width)] * n_layers, "uniform")
        for high in range(2, 9):
            add([high - 0.0 if i % 2 else 4.0 for i in range(n_layers)], "rate-distortion")
        for _ in range(n_random):
            middle = generator.integers(1, 7)
            legal = np.array([0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8])[middle : middle + 4]
            add([float(generator.choice(legal)) for _ in names], "nsga2")
        largest = 300 * 8 * n_layers + 900
        fields = {
            "task": "toy", "metric": "top-1", "higher_is_better": True, "percent": True,
            "n_validation": 1000, "float_validation": 0.92, "float_size_bytes": 4 * largest,
            "scale": HypervolumeScale(900, largest, 8.0),
            "budgets": Budgets.parse([f"{largest * 3 // 4}", f"{largest // 2}"]),
        } | info  # fmt: skip
        return evaluations, ParetoFront.of(evaluations, FrontInfo(**fields), seconds=12.0)  # type: ignore[arg-type]

    return make


CHECKOUT = Path(__file__).parents[2]
TINY_TASKS = Path(__file__).parent / "data" / "tiny_tasks.py"


@pytest.fixture(scope="session")
def tiny_tasks() -> ModuleType:
    """The module with the tasks that the end-to-end tests use."""
    spec = importlib.util.spec_from_file_location("tiny_tasks", TINY_TASKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], str]:
    """Name of a function in tiny_tasks.py to what `--task` takes."""
    return lambda name: f"{TINY_TASKS}:{name}"


@pytest.fixture(scope="session")
def search_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Popen[str]]:
    """Starts `search ...` as a process of its own: one thread, a cache and a home of its own."""
    cache = tmp_path_factory.mktemp("cache")
    home = tmp_path_factory.mktemp("home")

    def start(*arguments: object, **variables: str) -> Popen[str]:
        environment = {
            **os.environ, "PYTHONPATH": str(CHECKOUT), "BITFRONT_CACHE": str(cache),
            "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", **variables,
        }  # fmt: skip
        command = [sys.executable, "-m", "search", *map(str, arguments)]
        return Popen(command, env=environment, cwd=home, stdout=PIPE, stderr=PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def search_command(search_process: Callable[..., Popen[str]]) -> Callable[..., Finished]:
    """Runs `search ...` to its end: (exit code, stdout, stderr)."""

    def run(*arguments: object, **variables: str) -> Finished:
        with search_process(*arguments, **variables) as process:
            stdout, stderr = process.communicate(timeout=300)
        return Finished(process.returncode, stdout, stderr)

    return run


@pytest.fixture
def search_call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs `search ...` in this process, which saves its start."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Finished(code, *capsys.readouterr())

    return run
