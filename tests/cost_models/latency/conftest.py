"""A backend whose times follow a formula, and networks to lower."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cost_models.latency.backend import Backend, Runner
from cost_models.latency.roofline import features
from cost_models.latency.table import Entry, LatencyTable, Rule
from cost_models.latency.work import Call, Work
from quant_ops.graph import Graph
from search.capture import trace

DATA = ("add", "copy", "mean", "max_pool", "average_pool", "layout")
RULES = (
    Rule("int8", ("conv", "linear"), 8, 8, "narrower ones are widened"),
    Rule("weight4", ("linear",), 4, 32),
    Rule("float32", ("conv", "linear"), 32, 32),
    Rule("int8", ("quantize", "dequantize", *DATA), 32, 8),
    Rule("float32", DATA, 32, 32),
)
SPEED = {"float32": 1.0, "int8": 0.25, "weight4": 0.5}


def formula(work: Work, kernel: str) -> float:
    """Microseconds: exactly of the form that a roofline has."""
    terms = features(work)
    return 1.0 + SPEED[kernel] * 1e-3 * float(terms[1]) + 1e-4 * float(terms[2:].sum())


class _Fixed(Runner):
    def __init__(self, time_us: float) -> None:
        self._time_us = time_us

    def time_once(self) -> float:
        return self._time_us


class FormulaBackend(Backend):
    """Calls that take what `formula` says, runs that cost 3 us; counts what it is asked for."""

    name = "formula"
    rules = RULES

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads)
        self.prepared: list[tuple[Work, str]] = []

    def device(self):
        return {"name": "a formula", "fingerprint": "f0", "threads": self.threads}

    def libraries(self):
        return {"formula": "1"}

    def call(self, work: Work, kernel: str) -> Runner:
        self.prepared.append((work, kernel))
        return _Fixed(3.0 + formula(work, kernel))

    def empty(self, n_calls: int) -> Runner:
        return _Fixed(3.0)

    def network(self, graph: Graph, calls: list[Call]) -> Runner:
        return _Fixed(3.0 + sum(formula(c.work, c.kernel) for c in calls if c.kernel))


class Residual(nn.Module):
    """conv 1 -> 16, relu, conv 16 -> 16 + its input, relu, pool, conv 16 -> 24, mean, linear."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.three, self.head = nn.Conv2d(16, 24, 3, 2, 1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = F.relu(self.two(x) + x)
        x = F.relu(self.three(F.max_pool2d(x, 2)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def graph() -> Graph:
    torch.manual_seed(0)
    return trace(Residual().eval(), (torch.randn(2, 1, 8, 8),)).graph


@pytest.fixture
def make_table():
    def make(works, **changes) -> LatencyTable:
        entries = tuple(Entry(w, k, (formula(w, k),)) for w, k in works)
        settings = dict(
            name="made-up", device={"name": "a formula", "fingerprint": "f0"}, source="a formula",
            date="2026-01-01", backend="formula", unit="us", rules=RULES, entries=entries,
        ) | changes  # fmt: skip
        return LatencyTable(**settings)

    return make


@pytest.fixture
def formula_backend() -> FormulaBackend:
    return FormulaBackend()


@pytest.fixture
def expected():
    """Time of a call by the formula that the table and the backend follow."""
    return formula
