"""Recovery of recorded trials: each becomes a new trial that names its parent."""

from collections.abc import Sequence
from pathlib import Path

from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from search.coding import Coder, code_front
from search.config import RunConfig, read_config
from search.context import Limits, RunContext
from search.evaluation import CODED, Evaluation, within
from search.finish import packed_path
from search.front import FrontInfo, ParetoFront
from search.plots import thinned
from search.prepare import Prepared
from search.reallocation import as_searched, reallocated
from search.record import Record
from search.recovery import LEVELS, RECOVERY, Recovery, RecoverySettings, Step
from search.reopened import reopen
from search.settings import settings_of
from search.strategies.table import RECOVERY as SETTINGS_OF

MAX_RECOVERED = {"fast": 48, "full": 12}  # points of the front, evenly by rank
MAX_REFITS = 3  # candidates recovered for one size because the coded file came out too long
MOVED = "moved"  # fact beside a recovered trial: sizes at which its widths were moved
HOPELESS = 0.95  # of the loss of a useless model: nothing is left that could be recovered
BASELINE_SHARE = 3  # as many baselines as a third of that, each kind


def recover_front(
    prepared: Prepared,
    context: RunContext,
    record: Record,
    info: FrontInfo,
    coder: Coder | None = None,
) -> list[Evaluation]:
    """Recover the front and the baselines of a run, as its settings say; the new trials.

    What an interrupted run has recovered before is not recovered again. With a `coder` it is
    coded sizes that make the front and have to fit.
    """
    level = prepared.config.recover
    evaluations = [e for e in record.evaluations() if prepared.space.contains(e.candidate)]
    done = {e.parent for e in evaluations if e.recipe == level}
    plain = _seen([e for e in evaluations if not e.recipe], coder)
    settings = recovery_settings(prepared.config)
    n_points = settings.points or MAX_RECOVERED[level]
    todo = [e for e in _worth_recovering(plain, info, n_points) if e.trial not in done]
    recovery = Recovery(prepared, seed=prepared.config.seed, settings=settings)
    context.listener.on_phase(f"recovering the front ({level})")
    out = []
    for number, parent in enumerate(todo, start=1):
        out.append(_recover_one(recovery, context, record, parent, level)[0])
        context.listener.on_step(number, len(todo), f"recovered trial {parent.trial}")
    if coder is not None:
        for size in info.budgets.sizes:
            out += _fit(recovery, context, record, info, coder, size)
    if level == "full" and settings.swaps:
        context.listener.on_phase("moving widths between layers")
        for size in info.budgets.sizes:
            out += _reallocate(recovery, context, record, info, coder, size)
    return out


def _seen(evaluations: Sequence[Evaluation], coder: Coder | None) -> list[Evaluation]:
    """The evaluations at the size that counts."""
    return list(evaluations) if coder is None else [coder.as_coded(e) for e in evaluations]


def _fit(
    recovery: Recovery,
    context: RunContext,
    record: Record,
    info: FrontInfo,
    coder: Coder,
    size: int,
) -> list[Evaluation]:
    """Recover smaller candidates where recovery moved codes such that the coded file is too long.

    Only what was recovered has a length that counts; each retry asks for less by the excess.
    """
    level, limit = recovery.prepared.config.recover, size
    out: list[Evaluation] = []
    for _ in range(MAX_REFITS):
        evaluations = record.evaluations()
        front = ParetoFront.of(_seen([e for e in evaluations if not e.recipe], coder), info)
        if not front.points or front.points[0].size_bytes > limit:
            return out
        parent = front.best(limit)
        found = [e for e in evaluations if e.parent == parent.trial and e.recipe == level]
        if not found:
            found = [_recover_one(recovery, context, record, parent, level)[0]]
            out += found
        excess = coder.as_coded(found[0]).size_bytes - size
        if excess <= 0:
            return out
        limit = min(limit - excess, parent.size_bytes - 1)
    return out


def recovery_settings(config: RunConfig) -> RecoverySettings:
    """What `--set recovery.KEY=VALUE` says.

    Raises:
        UsageError: there is no such key, or the value does not fit.
    """
    return settings_of(RecoverySettings, config.settings, SETTINGS_OF)


def recover_trial(
    folder: Path, trial: int, level: str = "full", *, data: str | None = None
) -> tuple[Evaluation, tuple[Step, ...]]:
    """Recover one trial of a finished run and write its front anew.

    Raises:
        UsageError: there is no such run, trial or level.
    """
    if level not in LEVELS[1:]:
        raise UsageError(f"--recover must be one of {', '.join(LEVELS[1:])}, got {level!r}")
    run = reopen(folder, data=data)
    known = {e.trial: e for e in run.record.evaluations()}
    parent = run.trial(trial)
    while parent.recipe and parent.parent in known:  # start from its codes' own origin
        parent = known[parent.parent]
    config = run.prepared.config
    recovery = Recovery(run.prepared, seed=config.seed, settings=recovery_settings(config))
    evaluation, steps = _recover_one(recovery, run.context, run.record, parent, level)
    if config.codec == CODED:
        coder = Coder(run.prepared, folder)
        code_front(run.prepared, run.context, run.record, run.front.info, coder)
    run.write_front()
    return evaluation, steps


def _recover_one(
    recovery: Recovery, context: RunContext, record: Record, parent: Evaluation, level: str
) -> tuple[Evaluation, tuple[Step, ...]]:
    found = recovery.recover(parent.candidate, level)
    # a recovered baseline is still that baseline
    context.strategy = parent.strategy
    evaluation = context.submit(
        parent.candidate, found.model, recipe=found.recipe, parent=parent.trial
    )
    record.add_fact(evaluation.trial, RECOVERY, [step.to_json() for step in found.steps])
    return evaluation, found.steps


def _reallocate(
    recovery: Recovery,
    context: RunContext,
    record: Record,
    info: FrontInfo,
    coder: Coder | None,
    size: int,
) -> list[Evaluation]:
    """Move widths of the best recovered point of a size and recover again, while that helps.

    A point that was tried once carries a fact that says so and is not tried again on resume.
    """
    out: list[Evaluation] = []
    for _ in range(recovery.settings.swaps):
        recovered = [e for e in record.evaluations() if e.recipe == "full"]
        front = ParetoFront.of(_seen(recovered, coder), info)
        if not front.points or front.points[0].size_bytes > size:
            return out
        point = front.best(size)
        if str(size) in record.facts(MOVED).get(point.trial, {}):
            return out
        read = PackedModel.load(packed_path(context.run_folder, point.trial)).model
        model = as_searched(read, recovery.prepared, point.candidate)
        saved = context.size_of(point.candidate) - point.size_bytes
        found = reallocated(recovery.prepared, model, size + saved)
        tried = {e.candidate for e in recovered}
        if found is not None and found not in tried:
            context.begin("reallocation", Limits(None, None))
            (parent,) = context.evaluate([found])
            out.append(_recover_one(recovery, context, record, parent, "full")[0])
            context.listener.on_step(1, 1, f"moved widths at {size:,} bytes")
        known = record.facts(MOVED).get(point.trial, {})
        record.add_fact(point.trial, MOVED, {**known, str(size): found is not None})
    return out


def _worth_recovering(
    plain: Sequence[Evaluation], info: FrontInfo, n_points: int
) -> list[Evaluation]:
    """The best at every size asked for, then a few of each baseline and of the front, evenly.

    Sizes asked for come first: they are what the run is about. What knows no more of the input
    than a useless model is not worth the time.
    """
    front = ParetoFront.of(plain, info)
    smallest = front.points[0].size_bytes if front.points else 0
    asked = [front.best(size) for size in info.budgets.sizes if front.points and size >= smallest]
    chosen = {e.trial: e for e in asked}
    n_others = max(0, n_points - len(chosen))
    hopeless = HOPELESS * info.scale.worst_loss
    for name in sorted({e.strategy for e in front.baselines}):
        of_kind = [e for e in front.baselines if e.strategy == name and e.loss < hopeless]
        inside = [e for e in of_kind if within(info.budgets.limits, e.costs)]
        chosen |= {e.trial: e for e in thinned(inside, n_points // BASELINE_SHARE)}
    left = [e for e in front.points if e.trial not in chosen and e.loss < hopeless]
    chosen |= {e.trial: e for e in thinned(left, n_others)}
    return list(chosen.values())


def recoveries(folder: Path, front: ParetoFront) -> list[tuple[Evaluation, tuple[Step, ...]]]:
    """The recovered points of a run's front with their steps, smallest first."""
    config, _ = read_config(folder)
    record = Record.open(folder, storage=config.storage)
    facts = record.facts(RECOVERY)
    shown = {e.trial for e in front.points}
    return [
        (e, tuple(Step.from_json(step) for step in facts[e.trial]))
        for e in sorted(record.evaluations(), key=lambda e: e.size_bytes)
        if e.trial in shown and e.trial in facts
    ]


def recovery_steps(record: Record, trial: int) -> tuple[Step, ...]:
    """The steps of a recovered trial, () of any other."""
    return tuple(Step.from_json(step) for step in record.facts(RECOVERY).get(trial, ()))
