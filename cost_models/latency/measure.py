"""Measuring a latency table: every call in turn, round after round, kept after each round."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
from numpy.typing import NDArray

from cost_models.latency.backend import Backend, Overhead, Runner
from cost_models.latency.grid import Call
from cost_models.latency.table import Entry, LatencyTable
from quant_ops.errors import UsageError

ROUNDS = 12
PASSES = 40  # runs of every call in one round
_CHAINS = (1, 33)  # calls of the empty networks that tell the two overheads apart
_OVERHEAD_RUNS = 400
_LEAST = 0.05  # microseconds; what is faster than an empty call is taken for this
_UNKNOWN = 0.05  # seconds that preparing one call takes, before one was prepared

Progress = Callable[[int, int, str], None]
Save = Callable[[LatencyTable], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: every call is measured in each; its least time is kept per round.
        passes: runs of every call in one round.
    """

    rounds: int = ROUNDS
    passes: int = PASSES


def measure_overhead(backend: Backend) -> Overhead:
    """Time of an empty run and of an empty call, from two empty networks run in turn."""
    runners = [backend.empty(n) for n in _CHAINS]
    times = _least(runners, _OVERHEAD_RUNS)
    per_call = max(0.0, float(times[1] - times[0]) / (_CHAINS[1] - _CHAINS[0]))
    return Overhead(max(0.0, float(times[0]) - per_call * _CHAINS[0]), per_call)


def measure_table(
    backend: Backend,
    walks: Sequence[Sequence[Call]],
    *,
    name: str,
    known: LatencyTable | None = None,
    plan: Plan | None = None,
    progress: Progress = lambda done, total, text: None,
    save: Save = lambda table: None,
) -> LatencyTable:
    """Measure the calls of every walk, in rounds; what `known` holds is not measured again.

    Args:
        backend: whose kernels.
        walks: lists of calls, each run in turn.
        name: of the table.
        known: what an earlier, interrupted measurement on this device has.
        plan: how much is measured.
        progress: told of steps done, steps in all and what is happening.
        save: given the table so far after each round.

    Raises:
        UsageError: `known` is of another device, backend or library version.
    """
    plan = plan or Plan()
    table = _start(backend, name, known)
    rounds = {(e.work, e.kernel, e.resident_bytes): list(e.rounds) for e in table.entries}
    todo = [[c for c in walk if len(rounds.get(c, ())) < plan.rounds] for walk in walks]
    todo = [walk for walk in todo if walk]
    n_calls = sum(map(len, todo))
    overhead = measure_overhead(backend)
    runners: list[list[Runner]] = []
    for walk in todo:
        runners.append([backend.call(work, kernel) for work, kernel, _ in walk])
        progress(sum(map(len, runners)), n_calls, "preparing kernels")
    table = replace(table, call_overhead=overhead.per_run)
    for done in range(1, plan.rounds + 1):
        started = time.monotonic()
        for walk, ready in zip(todo, runners, strict=True):
            least = (_least(ready, plan.passes) - overhead.per_run) * [r.share for r in ready]
            found: dict[Call, float] = {}
            for call, own in zip(walk, least.tolist(), strict=True):
                found[call] = min(found.get(call, np.inf), round(max(own, _LEAST), 3))
            for call, own in found.items():
                kept = rounds.setdefault(call, [])
                if len(kept) < plan.rounds:
                    kept.append(own)
        entries = tuple(
            Entry(work, kernel, tuple(kept), resident_bytes=context)
            for (work, kernel, context), kept in rounds.items()
        )
        table = replace(table, entries=entries, conditions=_conditions(plan, overhead))
        if not todo:
            break
        save(table)
        left = (plan.rounds - done) * (time.monotonic() - started)
        progress(done, plan.rounds, f"round {done} of {plan.rounds}, {left:.0f} s left")
    return replace(table, complete=True)


def time_networks(
    runners: Sequence[Runner], rounds: int, passes: int, progress: Progress
) -> NDArray[np.float64]:
    """(rounds, networks): least time of each network in each round, run in turn; microseconds."""
    out = []
    for number in range(rounds):
        least = np.full(len(runners), np.inf)
        for _ in range(2):
            for at, runner in enumerate(runners):
                for _ in range(passes):  # one network after the other: its own weights in the cache
                    least[at] = min(least[at], runner.time_once())
        out.append(least)
        progress(number + 1, rounds, "timing whole networks")
    return np.array(out)


def _least(runners: Sequence[Runner], passes: int) -> NDArray[np.float64]:
    """(runners,): least of `passes` runs, all runners in turn each time."""
    least = np.full(len(runners), np.inf)
    for _ in range(passes):
        for at, runner in enumerate(runners):
            least[at] = min(least[at], runner.time_once())
    return least


def _start(backend: Backend, name: str, known: LatencyTable | None) -> LatencyTable:
    device = backend.device()
    libraries = dict(backend.libraries())
    if known is not None:
        for what, was, now in (
            ("device", known.device["name"], device["name"]),
            ("device", known.device["fingerprint"], device["fingerprint"]),
            ("backend", known.backend, backend.name),
            ("library", dict(known.libraries), libraries),
        ):
            if was != now:
                raise UsageError(
                    f"the measurement that is to go on was made with another {what}: {was}, now "
                    f"{now}; choose another --out"
                )
        return replace(known, complete=False)
    return LatencyTable(
        name=name,
        device=device,
        source="measured by search profile",
        date=date.today().isoformat(),
        backend=backend.name,
        unit="us",
        rules=backend.rules,
        entries=(),
        libraries=libraries,
        complete=False,
    )


def _conditions(plan: Plan, overhead: Overhead) -> dict[str, float]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "rounds": plan.rounds,
        "runs_per_round": plan.passes,
        "load_average": round(load, 2),
        "per_call_overhead_us": round(overhead.per_call, 3),
    }
