"""One run from start to end: prepare, search, check, write the front."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quant_ops.errors import BudgetError, UsageError
from search.budget import Budgets, format_cost
from search.cheapest import cheapest
from search.coding import SHARE, Coder, code_front, spend
from search.config import RunConfig, read_config, write_config
from search.context import Limits, Listener, RunContext
from search.dominance import HypervolumeScale
from search.evaluation import CODED, within
from search.exporters.foresight import require_target_runs
from search.finish import Checked, check_trials, packed_path
from search.front import BASELINES, FrontInfo, ParetoFront
from search.interactive import save_html
from search.plots import save_plots, thinned
from search.prepare import Prepared, prepare, require_sound_float
from search.record import JOURNAL, Record
from search.recovery_run import recover_front, recovery_settings
from search.report import float_test_of, known_test_metrics
from search.runners.base import Runner
from search.runners.in_process import InProcess
from search.show import read_front, write_unfinished
from search.space import SearchSpace
from search.strategies.table import (
    NO_STRATEGIES,
    make_strategy,
    parse_settings,
    strategy_class,
)
from search.strategy import SearchOver
from search.task import Task
from search.training.finetune import finetune_front, require_training
from search.training.trainable import Trainable

CHECKED = "checked"  # fact beside a trial: quality of the re-read file on all of validation
RESOLVE_TRIALS = 24  # evaluations spent on a new question put to a finished run
MAX_CHECKED = 48  # packed files written at the end of a run


@dataclass(frozen=True)
class Finished:
    """What a run gives back."""

    folder: Path
    front: ParetoFront
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
    asked = Budgets.parse(config.budgets)
    budgets = asked.limits
    require_reachable(prepared, budgets)
    require_strategies(config)
    _require_fitting(config, prepared.space)
    if config.finetunes or _training_strategies(config):
        require_training(task, config)
    listener.on_phase("measuring the float model")
    require_sound_float(prepared)
    require_target_runs(prepared)
    info = front_info(prepared, asked)
    if resume:
        info = replace(info, float_test=float_test_of(folder))
    answered = _claim_folder(prepared, folder, resume)
    record = _open_record(prepared, folder, resume)
    if answered is None:
        write_unfinished(folder, info)
    runner = _make_runner(prepared)
    started = time.monotonic()
    interrupted = False
    try:
        context = RunContext(
            space=prepared.space,
            budgets=budgets,
            sizes=asked.sizes,
            distortion=config.distortion,
            early_stop=config.early_stop,
            costs=prepared.costs,
            seed=config.seed,
            runner=runner,
            record=record,
            folder=folder,
            evaluator=prepared.evaluator,
            listener=listener,
            trainable=lambda context: Trainable.of(prepared, context, record),
        )
        coder = Coder(prepared, folder) if config.codec == CODED else None
        if answered is None or _asks_for_more(answered, config):
            _run_strategies(context, config, coder)
        elif _is_new_question(answered, config):
            _answer_from_record(context, config, coder)
        _write_config(prepared, folder, answered=config)
        _improve(prepared, context, record, info, coder)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        runner.close()
    if interrupted:
        return Finished(folder, read_front(folder), prepared, interrupted)
    listener.on_phase("packing and checking the front")
    front = finish(prepared, record, folder, info, time.monotonic() - started, listener)
    return Finished(folder, front, prepared, interrupted)


def require_reachable(prepared: Prepared, budgets: Mapping[str, float]) -> None:
    """Refuse budgets that not even the smallest candidate meets.

    Raises:
        BudgetError: names the budget and the reachable range.
    """
    space, graph = prepared.space, prepared.traced.graph
    for name, limit in budgets.items():
        if name not in prepared.costs:
            raise BudgetError(f"there is no cost model {name!r} in this run")
        cost = prepared.costs[name].cost
        low = cost(graph, cheapest(space, lambda c, cost=cost: cost(graph, c), limit))  # type: ignore[misc]
        high = cost(graph, space.largest())
        if limit < low:
            raise BudgetError(
                f"no candidate fits {format_cost(name, limit)} of {name}: the reachable range is "
                f"{format_cost(name, low)} to {format_cost(name, max(low, high))}; raise --budget, "
                f"or allow narrower layers with --bits"
            )


def finish(
    prepared: Prepared,
    record: Record,
    folder: Path,
    info: FrontInfo,
    seconds: float,
    listener: Listener,
) -> ParetoFront:
    """Pack, re-read and measure the front and the baselines; write front.json and the plots.

    The front that is written holds what the re-read files do on the whole validation split.
    """
    space = prepared.space
    evaluations = [
        e
        for e in record.evaluations()
        if space.contains(e.candidate) or (e.is_trained and space.allows(e.candidate))
    ]
    searched = ParetoFront.of(evaluations, info)
    limits = info.budgets.limits
    baselines = [e for e in searched.baselines if within(limits, e.costs)]
    wanted = {e.trial: e for e in (*thinned(searched.points, MAX_CHECKED), *baselines)}
    known = {t: Checked(**fact) for t, fact in record.facts(CHECKED).items()}

    def keep(checked: Checked) -> None:
        record.add_fact(checked.trial, CHECKED, asdict(checked))
        known[checked.trial] = checked
        listener.on_step(len(known), len(wanted), f"checked trial {checked.trial}")

    results = check_trials(
        prepared, list(wanted.values()), folder, known=tuple(known.values()), on_checked=keep
    )
    front = ParetoFront.of(
        results, info, weights_per_channel=prepared.space.weights_per_channel(), seconds=seconds
    )
    paths = {e.trial: str(packed_path(folder, e.trial).relative_to(folder)) for e in results}
    front = front.with_packed(paths).with_test(known_test_metrics(record, results))
    front = front.counting(evaluations)
    front.save(folder / "front.json")
    save_plots(front, folder, evaluations=evaluations)
    save_html(front, folder / "front.html")
    return front


def front_info(prepared: Prepared, budgets: Budgets) -> FrontInfo:
    """What the front of a run says about its task."""
    task, evaluator = prepared.task, prepared.evaluator
    smallest, eight = prepared.space.smallest(), prepared.space.uniform(8)
    cost = prepared.costs["size_bytes"].cost
    low, high = (int(cost(prepared.traced.graph, c)) for c in (smallest, eight))
    return FrontInfo(
        task=task.name,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        percent=task.metric.percent,
        n_validation=prepared.spec.splits["validation"].n_samples,
        float_validation=evaluator.measure_float(evaluator.judge("validation")).metric,
        float_size_bytes=prepared.traced.float_bytes,
        scale=HypervolumeScale(low, max(high, low + 1), prepared.worst_loss()),
        budgets=budgets,
        trained_apart=task.validation_seen_in_training,
    )


def require_new_folder(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        UsageError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder for --out")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty; choose another --out, or go on with the run it holds: "
            f"--resume {folder}"
        )


def _claim_folder(prepared: Prepared, folder: Path, resume: bool) -> RunConfig | None:
    """Write config.json, or check that it is of this model and data.

    Gives the settings under which the strategies last came to their end, None if never.
    """
    answered: RunConfig | None = None
    if resume:
        _, stored = read_config(folder)
        for what, digest in prepared.digests.items():
            if stored["digests"].get(what) != digest:
                raise UsageError(
                    f"{folder} holds a run of another {what}: its digest was "
                    f"{stored['digests'].get(what)}, now it is {digest}; start a new run without "
                    f"--resume"
                )
        if stored.get("answered") is not None:
            answered = RunConfig.from_json(stored["answered"])
    else:
        require_new_folder(folder)
    _write_config(prepared, folder, answered=answered)
    return answered


def _write_config(prepared: Prepared, folder: Path, *, answered: RunConfig | None) -> None:
    facts = {
        "digests": prepared.digests,
        "task_name": prepared.task.name,
        "answered": None if answered is None else answered.to_json(),
    }
    write_config(folder, prepared.config, facts)


def _open_record(prepared: Prepared, folder: Path, resume: bool) -> Record:
    name, storage = prepared.task.name, prepared.config.storage
    # a run that was killed before its first trial may have no record yet
    if (folder / JOURNAL).exists() or (resume and storage is not None):
        return Record.open(folder, name=name, storage=storage)
    return Record.create(folder, name=name, metadata=prepared.digests, storage=storage)


def require_strategies(config: RunConfig) -> None:
    """Refuse strategies and settings that there are not, before a task is loaded.

    Raises:
        UsageError: names the strategy or setting.
    """
    settings = _settings_of(config)
    recovery_settings(config)
    for name in {*config.strategies, *settings} - set(NO_STRATEGIES):
        strategy = make_strategy(name, settings.get(name))
        if getattr(strategy.settings, "pairs", False) and config.distortion != "exact":
            raise UsageError(
                f"{name}.pairs=true needs --distortion exact, got {config.distortion}: gradients "
                f"predict single layers only"
            )


def _require_fitting(config: RunConfig, space: SearchSpace) -> None:
    settings = _settings_of(config)
    for name in config.strategies:
        make_strategy(name, settings.get(name)).check(space)


def _settings_of(config: RunConfig) -> dict[str, dict[str, str]]:
    return parse_settings(f"{key}={value}" for key, value in config.settings.items())


def _make_runner(prepared: Prepared) -> Runner:
    config = prepared.config
    if config.workers == 0 and config.ray_address is None:
        return InProcess(prepared.evaluator)
    from search.runners.cluster import Cluster

    n_workers = max(1, config.workers)
    threads = config.threads or max(1, torch.get_num_threads() // n_workers)
    return Cluster(prepared.spec, n_workers=n_workers, address=config.ray_address, threads=threads)


def _run_strategies(context: RunContext, config: RunConfig, coder: Coder | None) -> None:
    """One strategy after the other, each with an equal share of what is left.

    With a codec the last share is spent on candidates that fit only when they are coded.
    """
    started = time.monotonic()
    settings = _settings_of(config)
    used, kept = 0, 1.0 if coder is None else 1 - 1 / SHARE
    limit, time_s = config.trial_limit, config.time_limit_s
    end = None if time_s is None else started + time_s
    first = None if limit is None else max(1, int(kept * limit))
    for position, name in enumerate(config.strategies):
        n_left = len(config.strategies) - position
        trials = None
        if first is not None:
            trials = (first - used) // n_left
        deadline = None
        if time_s is not None:
            now = time.monotonic()
            deadline = now + (started + kept * time_s - now) / n_left
        context.begin(name, Limits(trials, deadline))
        with contextlib.suppress(SearchOver):
            make_strategy(name, settings.get(name)).run(context)
        used += context.n_used
    if coder is not None:
        spend(context, coder, Limits(None if limit is None else limit - used, end))


def _improve(
    prepared: Prepared,
    context: RunContext,
    record: Record,
    info: FrontInfo,
    coder: Coder | None,
) -> None:
    """Better weights for what was found, then shorter files; what is done is not done again.

    Where a strategy trains, the time of --finetune is its own.
    """
    if prepared.config.recover != "none":
        recover_front(prepared, context, record, info, coder)
    if prepared.config.finetunes and not _training_strategies(prepared.config):
        finetune_front(prepared, context, record, info)
    if coder is not None:
        code_front(prepared, context, record, info, coder)


def _asks_for_more(answered: RunConfig, now: RunConfig) -> bool:
    """Whether other trials or time are asked for than those that are used up."""
    limits = (now.trial_limit, now.time_limit_s)
    return limits != (answered.trial_limit, answered.time_limit_s)


def _is_new_question(answered: RunConfig, now: RunConfig) -> bool:
    before = (answered.budgets, answered.pins, answered.bits)
    return before != (now.budgets, now.pins, now.bits)


def _answer_from_record(context: RunContext, config: RunConfig, coder: Coder | None) -> None:
    """Solve the integer program again on the measured table, under the new limits.

    Strategies that train do so for sizes that are new.
    """
    training = _training_strategies(config)
    settings = _settings_of(config)
    for name in training or BASELINES:
        context.begin(name, Limits(RESOLVE_TRIALS, None))
        with contextlib.suppress(SearchOver):
            make_strategy(name, settings.get(name) if training else {}).run(context)
    if coder is not None:
        spend(context, coder, Limits(RESOLVE_TRIALS, None))


def _training_strategies(config: RunConfig) -> list[str]:
    return [name for name in config.strategies if strategy_class(name).traits.needs_training]
