"""`search inspect`: what a search would do, before anything runs."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from quant_ops.channels import tied_channels
from search.budget import Budgets, format_cost, format_size
from search.config import DEFAULT_TRIALS, RunConfig
from search.durations import format_duration
from search.engine import require_reachable
from search.exporters.foresight import foreseen_refusals
from search.prepare import Prepared, prepare
from search.space import SearchSpace
from search.strategies.distortion import n_probes
from search.tables import stdout_console
from search.task import Task


@dataclass(frozen=True)
class Fate:
    """What becomes of one weight tensor."""

    name: str
    kind: str
    n_weights: int
    macs: int
    bit_widths: tuple[float, ...]
    reason: str

    def to_text(self) -> str:
        """`searched: 1, 2, 4 bits` or `float: because ...`."""
        if self.reason:
            return f"float: {self.reason}"
        widths = ", ".join(f"{b:g}" for b in self.bit_widths)
        return f"pinned: {widths} bits" if len(self.bit_widths) == 1 else f"searched: {widths}"


@dataclass(frozen=True)
class Inspection:
    """Layers, ties, reachable range of each budget, expected time.

    `ties` counts the removable channels that several layers share, by those layers.
    """

    task: str
    fates: tuple[Fate, ...]
    edges: Mapping[str, tuple[int, ...]]
    ties: Mapping[tuple[str, ...], int]
    float_bytes: int
    ranges: Mapping[str, tuple[float, float]]
    budgets: Mapping[str, float]
    n_genes: int
    n_probes: int
    seconds_per_evaluation: float
    expected_seconds: float
    refusals: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "task": self.task,
            "layers": [
                {
                    "name": f.name,
                    "kind": f.kind,
                    "parameters": f.n_weights,
                    "macs": f.macs,
                    "bit_widths": list(f.bit_widths),
                    "kept_float_because": f.reason or None,
                }
                for f in self.fates
            ],
            "edges": [{"name": name, "bit_widths": list(b)} for name, b in self.edges.items()],
            "ties": [{"layers": list(names), "channels": n} for names, n in self.ties.items()],
            "float_bytes": self.float_bytes,
            "reachable": {name: list(pair) for name, pair in self.ranges.items()},
            "budgets": dict(self.budgets),
            "seconds_per_evaluation": self.seconds_per_evaluation,
            "expected_seconds": self.expected_seconds,
            "target_refuses": list(self.refusals),
        }

    def print(self) -> None:
        """Print tables on stdout."""
        console = stdout_console()
        table = Table(title=f"{self.task}: {format_size(self.float_bytes)} in float")
        table.add_column("layer", overflow="fold")
        table.add_column("kind")
        table.add_column("parameters", justify="right")
        table.add_column("MACs", justify="right")
        table.add_column("fate", overflow="fold")
        for fate in self.fates:
            table.add_row(
                fate.name, fate.kind, f"{fate.n_weights:,}", f"{fate.macs:,}", fate.to_text()
            )
        console.print(table)
        if self.edges:
            console.print("Activation edges, for --pin edge:NAME=BITS:")
            for name, widths in self.edges.items():
                console.print(f"  {name}: {', '.join(map(str, widths))}", highlight=False)
        if self.ties:
            console.print("Channels that can only be removed together:")
            for names, n in self.ties.items():
                console.print(f"  {n} of {', '.join(names)}", highlight=False, soft_wrap=True)
        if self.refusals:
            console.print("The target cannot run, so that a search for it would be refused:")
            for refusal in self.refusals:
                console.print(f"  {refusal}", highlight=False, soft_wrap=True, markup=False)
        reach = Table(title="reachable")
        for column in ("cost", "from", "to", "budget"):
            reach.add_column(column, justify="left" if column == "cost" else "right")
        for name, (low, high) in self.ranges.items():
            limit = self.budgets.get(name)
            shown = "-" if limit is None else format_cost(name, limit)
            reach.add_row(name, format_cost(name, low), format_cost(name, high), shown)
        console.print(reach)
        console.print(
            f"{self.n_genes} choices, {self.n_probes} sensitivity measurements; about "
            f"{self.seconds_per_evaluation:.2g} s an evaluation, "
            f"{format_duration(self.expected_seconds)} for the default {DEFAULT_TRIALS} trials",
            highlight=False,
        )


def inspect_task(task: Task, config: RunConfig) -> Inspection:
    """Trace the task, list what a search would choose and how long it would take.

    Raises:
        BudgetError: a budget below the reachable range.
    """
    prepared = prepare(task, config)
    budgets = Budgets.parse(config.budgets).limits
    require_reachable(prepared, budgets)
    space = prepared.space
    seconds, probe_seconds = _time_evaluation(prepared)
    trials = config.trial_limit or DEFAULT_TRIALS
    low, high = space.smallest(), space.largest()
    graph = prepared.traced.graph
    return Inspection(
        task=task.name,
        fates=_fates(prepared, space),
        edges={edge.name: edge.bit_widths for edge in space.activations},
        ties=Counter(t.layers for t in tied_channels(graph) if t.removable and len(t.layers) > 1),
        float_bytes=prepared.traced.float_bytes,
        ranges={
            name: (model.cost(graph, low), model.cost(graph, high))
            for name, model in prepared.costs.items()
        },
        budgets=budgets,
        n_genes=sum(len(widths) > 1 for widths in space.gene_widths),
        n_probes=n_probes(space),
        seconds_per_evaluation=seconds,
        expected_seconds=trials * seconds + n_probes(space) * probe_seconds,
        refusals=tuple(str(refusal) for refusal in foreseen_refusals(prepared)),
    )


def _fates(prepared: Prepared, space: SearchSpace) -> tuple[Fate, ...]:
    widths = {choice.name: choice.bit_widths for choice in space.layers}
    return tuple(
        Fate(x.name, x.kind, x.n_weights, x.macs, widths.get(x.name, ()), x.reason)
        for x in prepared.traced.graph.layers
    )


def _time_evaluation(prepared: Prepared) -> tuple[float, float]:
    """Seconds of one evaluation and of one probe, timed on the probe split."""
    evaluator = prepared.evaluator
    candidate = prepared.space.largest()
    evaluator.measure(candidate, "probe")
    started = time.perf_counter()
    evaluator.measure(candidate, "probe")
    probe_seconds = time.perf_counter() - started
    splits = prepared.spec.splits
    ratio = splits["search"].n_samples / max(1, splits["probe"].n_samples)
    return probe_seconds * ratio, probe_seconds
