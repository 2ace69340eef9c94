"""The Python interface: `front = search.run(task, budget="4MB")`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from quant_ops.errors import NothingFeasibleError, UsageError
from quant_ops.packed import PackedModel
from search.budget import parse_size
from search.config import RunConfig
from search.context import Listener
from search.engine import run_search
from search.evaluation import Evaluation
from search.finish import packed_path
from search.front import ParetoFront, best_of
from search.task import Task


@dataclass(frozen=True)
class Front:
    """The Pareto front of a finished run: iterate over it, take a model, plot it."""

    folder: Path
    points: tuple[Evaluation, ...]
    trained_apart: bool = False

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self.points)

    def best(self, size: str | int | None = None) -> PackedModel:
        """The packed model of lowest validation loss at or under `size` ("2MB" or bytes).

        Raises:
            NothingFeasibleError: no point is that small.
        """
        point = self.best_point(size)
        return PackedModel.load(packed_path(self.folder, point.trial))

    def best_point(self, size: str | int | None = None) -> Evaluation:
        """The evaluation behind `best`."""
        limit = parse_size(size) if isinstance(size, str) else size
        found = best_of(self.points, limit, trained_apart=self.trained_apart)
        if found is None:
            smallest = min((p.size_bytes for p in self.points), default=0)
            raise NothingFeasibleError(
                f"no point of the front fits {limit:,} bytes; the smallest has {smallest:,}"
            )
        return found

    def plot(self) -> Path:
        """The picture of the front, a PNG in the run's folder."""
        return self.folder / "front.png"


def run(
    task: Task | str,
    budget: str | Sequence[str] = (),
    *,
    out: str | Path | None = None,
    config: RunConfig | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    **settings: object,
) -> Front:
    """Search for packed models of `task` inside `budget`.

    Args:
        task: a Task, or what `--task` takes.
        budget: one or several of "4MB", "bops=1G", ...
        out: folder of the run; by default runs/<task>-<number>.
        config: all settings at once; `settings` are fields of it.
        listener: told of progress.
        resume: go on with the run in `out`.
        **settings: any field of `RunConfig`: trials=100, seed=1, bits=(2, 4, 8), ...

    Raises:
        NothingFeasibleError: no evaluated candidate meets the budget.
        BudgetError: none can.
        UsageError: a setting, the task or the folder cannot be used.
    """
    from search.folders import new_folder
    from search.tasks.table import load_task

    budgets = (budget,) if isinstance(budget, str) else tuple(budget)
    base = config or RunConfig()
    name = task if isinstance(task, str) else task.name
    unknown = set(settings) - ({f.name for f in fields(RunConfig)} - {"task", "budgets"})
    if unknown:
        raise UsageError(
            f"search.run has no setting {', '.join(sorted(unknown))}; settings are the fields of "
            f"search.config.RunConfig, and budgets are given as budget=..."
        )
    asked = replace(base, task=name, budgets=budgets, **settings)  # type: ignore[arg-type]
    if isinstance(task, str):
        task = load_task(task, data=Path(asked.data) if asked.data else None)
    folder = Path(out) if out is not None else new_folder(task.name)
    finished = run_search(task, asked, folder, listener=listener, resume=resume)
    if not finished.front.points:
        raise NothingFeasibleError(f"no evaluated candidate of {folder} meets every budget")
    return Front(folder, finished.front.points, finished.front.info.trained_apart)


def load(folder: str | Path) -> Front:
    """The front of a finished run."""
    path = Path(folder)
    front = ParetoFront.load(path / "front.json")
    return Front(path, front.points, front.info.trained_apart)
