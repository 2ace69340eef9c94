"""`search profile`: measure a latency table, and check finished candidates as whole networks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.latency.backend import Backend
from cost_models.latency.grid import Call, grid_walks, task_walks
from cost_models.latency.lowering import calls_of, smaller_network
from cost_models.latency.measure import Plan, measure_table, time_networks
from cost_models.latency.model import Latency
from cost_models.latency.table import LatencyTable, load_table, read_table
from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError
from quant_ops.graph import Graph
from quant_ops.removal import NOTHING
from search.atomic import write_text
from search.capture import trace
from search.config import read_config
from search.context import Listener
from search.latency import find_table, other_device
from search.prediction import rank_correlation
from search.prepare import prepare
from search.record import Record
from search.show import read_front
from search.task import Task

LATENCY = "latency"  # fact beside a trial: a LatencyCheck
CHECK_ROUNDS, CHECK_PASSES = 8, 20
FEWEST = 3  # networks that have a rank correlation to speak of


@dataclass(frozen=True, slots=True)
class LatencyCheck:
    """Predicted against measured latency of one whole network, in milliseconds.

    Attributes:
        table, device: what the prediction is from, and where the network was timed.
        predicted_ms: by the table.
        measured_ms: least of all rounds.
        spread: how far the median round lies above the least, as a share of it.
        halves_ms: least of the even and of the odd rounds: what a repetition would change.
    """

    table: str
    device: str
    predicted_ms: float
    measured_ms: float
    spread: float
    halves_ms: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_ms / self.measured_ms


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """How good a table's predictions were.

    Attributes:
        n_networks: compared.
        median_ratio: of predicted to measured.
        median_error: of |ratio - 1|.
        rank_correlation: Spearman's, of predicted and measured; None of fewer than three.
        repeatability: the same between two halves of the measurement: what can be had at best.
    """

    n_networks: int
    median_ratio: float
    median_error: float
    rank_correlation: float | None
    repeatability: float | None

    @classmethod
    def of(cls, checks: Sequence[LatencyCheck]) -> "LatencySummary":
        """Of at least one check."""
        predicted, measured = (
            np.array([getattr(c, name) for c in checks]) for name in ("predicted_ms", "measured_ms")
        )
        first, second = np.array([c.halves_ms for c in checks]).T
        enough = len(checks) >= FEWEST
        return cls(
            len(checks),
            float(np.median(predicted / measured)),
            float(np.median(np.abs(predicted / measured - 1))),
            rank_correlation(predicted, measured) if enough else None,
            rank_correlation(first, second) if enough else None,
        )

    def line(self) -> str:
        """For people."""
        text = (
            f"predicted / measured latency of {self.n_networks} whole networks: median "
            f"{self.median_ratio:.2f}, median error {100 * self.median_error:.1f} %"
        )
        if self.rank_correlation is None:
            return text
        return (
            f"{text}, rank correlation {self.rank_correlation:.3f} (of two measurements of the "
            f"same: {self.repeatability:.3f})"
        )


def profile(
    backend: Backend,
    task: Task | None,
    out: Path,
    *,
    plan: Plan | None = None,
    pruned: bool = True,
    listener: Listener | None = None,
) -> LatencyTable:
    """Measure the calls of a task's network, or a grid of sizes where there is no task.

    The file is written after every round; what an interrupted measurement left there is gone on
    with, and a complete table is extended by what it lacks.

    Args:
        backend: whose kernels.
        task: whose shapes; None: the grid.
        out: file of the table.
        plan: how much is measured.
        pruned: also measure the shapes that are left when channels are removed.
        listener: told of progress.
    """
    listener = listener or Listener()
    known = read_table(out) if out.exists() else None
    empty = LatencyTable("", {}, "", "", "", "us", backend.rules, ())
    walks: list[list[Call]]
    if task is None:
        walks = grid_walks(empty.kernel_for, empty.weight_bytes)
    else:
        listener.on_phase("capturing the model")
        graph = trace(task.model, task.examples()).graph
        walks = task_walks(graph, empty.kernel_for, empty.weight_bytes, pruned=pruned)
    listener.on_phase(f"measuring {sum(map(len, walks))} kernel calls")

    def save(table: LatencyTable) -> None:
        write_text(out, table.to_text())

    table = measure_table(
        backend,
        walks,
        name=out.name.removesuffix(".json"),
        known=known,
        plan=plan,
        progress=listener.on_step,
        save=save,
    )
    save(table)
    return table


def check_run(
    folder: Path,
    table_name: str,
    backend_of: type[Backend],
    *,
    task: Task,
    extrapolate: bool = False,
    listener: Listener | None = None,
) -> dict[int, LatencyCheck]:
    """Time the points and baselines of a finished run as whole networks, keep what is found.

    Raises:
        UsageError: the run has no points, or a network that cannot be built or predicted.
    """
    listener = listener or Listener()
    front = read_front(folder)
    config, _ = read_config(folder)
    table = load_table(find_table(table_name))
    if table.backend != backend_of.name:
        raise UsageError(
            f"latency table {table.name!r} is of {table.backend}; whole networks are timed with "
            f"{backend_of.name}, so there is nothing to compare"
        )
    backend = backend_of(int(table.device.get("threads", 1)))
    evaluations = {e.trial: e for e in (*front.points, *front.baselines)}
    if not evaluations:
        raise UsageError(f"the run in {folder} has no candidate yet whose latency to measure")
    graph = prepare(task, config).traced.graph
    checks = check_candidates(
        graph,
        {trial: e.candidate for trial, e in evaluations.items()},
        Latency(table, extrapolate=extrapolate),
        backend,
        listener=listener,
    )
    record = Record.open(folder, storage=config.storage)
    for trial, check in checks.items():
        record.add_fact(trial, LATENCY, asdict(check))
    return dict(sorted(checks.items()))


def check_candidates(
    graph: Graph,
    candidates: Mapping[int, Candidate],
    model: Latency,
    backend: Backend,
    *,
    rounds: int = CHECK_ROUNDS,
    passes: int = CHECK_PASSES,
    listener: Listener | None = None,
) -> dict[int, LatencyCheck]:
    """Predicted and measured latency of candidates, timed in turn, by their numbers."""
    listener = listener or Listener()
    listener.on_phase("building whole networks")
    table = model.table
    runners = []
    for candidate in candidates.values():
        smaller, widths = smaller_network(graph, candidate)
        calls = calls_of(smaller, widths, NOTHING, table.kernel_for)
        runners.append(backend.network(smaller, calls))
    listener.on_phase("timing whole networks")
    times = 1e-3 * time_networks(runners, rounds, passes, listener.on_step)
    device = str(backend.device()["name"])
    checks = {}
    for (trial, candidate), measured in zip(candidates.items(), times.T, strict=True):
        least = float(measured.min())
        checks[trial] = LatencyCheck(
            table.name,
            device,
            predicted_ms=model.cost(graph, candidate),
            measured_ms=least,
            spread=float(np.median(measured)) / least - 1,
            halves_ms=(float(measured[::2].min()), float(measured[1::2].min())),
        )
    return checks


def latency_checks(folder: Path) -> dict[int, LatencyCheck]:
    """What earlier checks found of a run's trials."""
    config, _ = read_config(folder)
    try:
        facts: Mapping[int, Any] = Record.open(folder, storage=config.storage).facts(LATENCY)
    except UsageError:  # stopped before its first trial
        return {}
    return {
        trial: LatencyCheck(**{**fact, "halves_ms": tuple(fact["halves_ms"])})
        for trial, fact in sorted(facts.items())
    }


def device_note(table_name: str) -> str:
    """What to know where a table is of another device than this one, else ""."""
    return other_device(load_table(find_table(table_name)))
