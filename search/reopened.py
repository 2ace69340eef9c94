"""A finished run opened again, to add trials to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant_ops.errors import UsageError
from search.budget import Budgets
from search.config import read_config
from search.context import Listener, RunContext
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.prepare import Prepared, prepare
from search.record import Record
from search.runners.in_process import InProcess
from search.show import read_front


@dataclass(frozen=True)
class Reopened:
    """A run with what it takes to submit further trials."""

    folder: Path
    prepared: Prepared
    record: Record
    context: RunContext
    front: ParetoFront

    def trial(self, number: int) -> Evaluation:
        """The evaluation of that number.

        Raises:
            UsageError: there is none.
        """
        for evaluation in self.record.evaluations():
            if evaluation.trial == number:
                return evaluation
        raise UsageError(
            f"{self.folder} has no trial {number}; `search show {self.folder}` lists those of "
            f"the front"
        )

    def write_front(self) -> None:
        """Pack, check and write the front anew."""
        from search.engine import finish

        listener, front = self.context.listener, self.front
        finish(self.prepared, self.record, self.folder, front.info, front.seconds, listener)


def reopen(
    folder: Path,
    *,
    data: str | None = None,
    changes: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Reopened:
    """Open the run in `folder`.

    Args:
        folder: of a finished run.
        data: folder with the data sets, if it is not that of the run.
        changes: fields of its `RunConfig` that differ from the stored ones.
        listener: told of progress.

    Raises:
        UsageError: the folder holds no run.
    """
    from search.tasks.table import load_task

    stored, _ = read_config(folder)
    config = replace(stored, **(changes or {}))
    front = read_front(folder)
    record = Record.open(folder, storage=config.storage)
    where = data or config.data
    prepared = prepare(load_task(config.task, data=Path(where) if where else None), config)
    budgets = Budgets.parse(config.budgets)
    context = RunContext(
        space=prepared.space,
        budgets=budgets.limits,
        sizes=budgets.sizes,
        costs=prepared.costs,
        seed=config.seed,
        runner=InProcess(prepared.evaluator),
        record=record,
        folder=folder,
        evaluator=prepared.evaluator,
        listener=listener,
    )
    return Reopened(folder, prepared, record, context, front)
