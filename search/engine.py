"""One run from start to end: prepare, search, check, write the front."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant_ops.errors import BudgetError, EnvironmentFault, UsageError
from search.budget import format_size, parse_budgets
from search.config import RunConfig, read_config, write_config
from search.context import Limits, Listener, RunContext
from search.evaluation import Evaluation, within
from search.finish import check_trials
from search.front import ParetoFront
from search.prepare import Prepared, prepare
from search.record import Record
from search.runners.base import Runner
from search.runners.in_process import InProcess
from search.strategies.table import make_strategy
from search.strategy import SearchOver
from search.task import Task

BASELINES = ("uniform", "rate-distortion")
RESOLVE_TRIALS = 24  # evaluations spent on a new question put to a finished run
MAX_CHECKED = 48  # packed files written at the end of a run


@dataclass(frozen=True)
class Finished:
    """What a run gives back."""

    folder: Path
    front: ParetoFront
    baselines: tuple[Evaluation, ...]
    prepared: Prepared
    interrupted: bool


def run_search(
    task: Task,
    config: RunConfig,
    folder: Path,
    *,
    listener: Listener | None = None,
    resume: bool = False,
) -> Finished:
    """Search, then pack and check the front; everything is kept in `folder`.

    Args:
        task: what to compress.
        config: the settings; on resume the stored ones with the user's changes.
        folder: new or empty; on resume that of the run.
        listener: told of progress.
        resume: go on with the run that `folder` holds.

    Raises:
        BudgetError: no candidate can meet the budgets; the message gives the reachable range.
        UsageError: the folder holds another run, or the resumed run is of another model.
    """
    listener = listener or Listener()
    listener.on_phase("capturing the model")
    prepared = prepare(task, config)
    budgets = parse_budgets(config.budgets)
    require_reachable(prepared, budgets)
    record, asked_before = _open_record(prepared, folder, resume)
    listener.on_phase("measuring the float model")
    prepared.evaluator.measure_float("search")
    runner = _make_runner(prepared)
    started = time.monotonic()
    interrupted = False
    try:
        context = RunContext(
            space=prepared.space,
            budgets=budgets,
            costs=prepared.costs,
            seed=config.seed,
            runner=runner,
            record=record,
            folder=folder,
            evaluator=prepared.evaluator,
            listener=listener,
        )
        _run_strategies(context, config, started, new_question=_is_new(asked_before, config))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        runner.close()
    listener.on_phase("packing and checking the front")
    front, baselines = finish(prepared, record, folder, budgets, time.monotonic() - started)
    return Finished(folder, front, baselines, prepared, interrupted)


def require_reachable(prepared: Prepared, budgets: Mapping[str, float]) -> None:
    """Refuse budgets that not even the smallest candidate meets.

    Raises:
        BudgetError: names the budget and the reachable range.
    """
    smallest, largest = prepared.space.smallest(), prepared.space.largest()
    graph = prepared.traced.graph
    for name, limit in budgets.items():
        if name not in prepared.costs:
            raise BudgetError(f"there is no cost model {name!r} in this run")
        cost = prepared.costs[name].cost
        low, high = cost(graph, smallest), cost(graph, largest)
        if limit < low:
            show = format_size if name == "size_bytes" else "{:,.0f}".format
            raise BudgetError(
                f"no candidate fits {show(limit)} of {name}: the reachable range is "
                f"{show(low)} to {show(high)}; raise --budget, or allow narrower layers with "
                f"--bits and --granularity channel"
            )


def finish(
    prepared: Prepared,
    record: Record,
    folder: Path,
    budgets: Mapping[str, float],
    seconds: float,
) -> tuple[ParetoFront, tuple[Evaluation, ...]]:
    """Pack and check the points of the front and the baselines; write front.json and plots."""
    evaluations = [
        e for e in record.evaluations() if not e.pruned and prepared.space.contains(e.candidate)
    ]
    searched = ParetoFront.of(evaluations, budgets)
    points = _thinned(searched.points, MAX_CHECKED)
    baselines = [e for e in evaluations if e.strategy in BASELINES and not e.recipe]
    shown = [e for e in baselines if within(budgets, e.costs)]
    shown = [e for e in shown if e.strategy == "uniform"] + list(
        _thinned(ParetoFront.of([e for e in shown if e.strategy != "uniform"], {}).points, 24)
    )
    wanted = list({e.trial: e for e in [*points, *shown]}.values())
    known = record.checked()
    checked = {
        e.trial: e
        for e in check_trials(
            prepared, wanted, folder, known=known, on_checked=record.add_checked
        )
    }
    front = ParetoFront.of(list(checked.values()), budgets)
    final_baselines = tuple(checked[e.trial] for e in shown)
    write_front(prepared, record, folder, front, final_baselines, budgets, seconds)
    return front, final_baselines
