"""`search report --test`: the one reader of the labelled test split."""

from collections.abc import Collection, Iterable
from pathlib import Path

from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from search.config import read_config
from search.data import EVALUATION_BATCH, load_split
from search.evaluation import Evaluation
from search.finish import packed_path, runner_of
from search.front import ParetoFront
from search.interactive import save_html
from search.judge import Judge
from search.plots import save_plots
from search.prepare import prepare
from search.record import Record
from search.show import FRONT, read_front

TEST = "test"  # fact beside a trial: {weights digest: metric on the test split}


def read_test_split(
    folder: Path, *, data: str | None = None, trials: Collection[int] | None = None
) -> ParetoFront:
    """Measure float, the points of the finished front and uniform widths on the test split.

    The front is frozen: it was chosen on validation. Every file is measured once; answers are
    kept in the record by weight digest.

    Args:
        folder: of the run.
        data: folder with the data sets, if it is not that of the run.
        trials: numbers of the points to measure; None measures all.

    Raises:
        UsageError: the task has no test split, or the front no such trial.
    """
    from search.tasks.table import load_task

    front = read_front(folder)
    config, _ = read_config(folder)
    where = data or config.data
    task = load_task(config.task, data=Path(where) if where else None)
    if task.test is None:
        raise UsageError(f"task {task.name!r} has no test split; give Task(test=...) a function")
    record = Record.open(folder, storage=config.storage)
    uniform = [e for e in front.baselines if e.strategy == "uniform"]
    points = {e.trial: e for e in (*front.points, *uniform)}
    metrics = known_test_metrics(record, points.values())
    unknown = sorted(set(trials or ()) - points.keys())
    if unknown:
        raise UsageError(
            f"the front of {folder} has no trial {unknown[0]}; "
            f"`search show {folder}` lists its points"
        )
    asked = points if trials is None else trials
    todo = [trial for trial in points if trial in asked and trial not in metrics]
    float_test = front.info.float_test
    if todo or float_test is None:
        prepared = prepare(task, config)
        batch = prepared.traced.static_batch or EVALUATION_BATCH
        split = load_split(task.test(), what="test", batch=batch)
        judge = prepared.evaluator.new_judge(split)
        float_test = prepared.evaluator.measure_float(judge).metric
        for trial in todo:
            packed = PackedModel.load(packed_path(folder, trial))
            metric = _metric(judge, packed, prepared.traced.out_spec)
            if metric is not None:
                metrics[trial] = metric
                record.add_fact(trial, TEST, {points[trial].weights_digest: metric})
    front = front.with_test(metrics, float_test=float_test)
    front.save(folder / "front.json")
    save_plots(front, folder, evaluations=record.evaluations())
    save_html(front, folder / "front.html")
    return front


def known_test_metrics(record: Record, evaluations: Iterable[Evaluation]) -> dict[int, float]:
    """What the record knows of these trials' files on the test split, by trial."""
    facts = record.facts(TEST)
    digests = {e.trial: e.weights_digest for e in evaluations}
    return {t: facts[t][d] for t, d in digests.items() if d in facts.get(t, {})}


def float_test_of(folder: Path) -> float | None:
    """The float model's test metric, if an earlier report read it."""
    path = folder / FRONT
    return ParetoFront.load(path).info.float_test if path.exists() else None


def _metric(judge: Judge, packed: PackedModel, out_spec: object) -> float | None:
    return judge.measure(runner_of(packed, out_spec)).metric  # type: ignore[arg-type]
