"""Progress on stderr: what is being done, best so far, evaluations per second, time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from search.budget import format_size
from search.context import Listener
from search.durations import format_duration
from search.evaluation import Evaluation


class ConsoleListener(Listener):
    """Shows one line that changes (a terminal) or one line per phase (a pipe)."""

    def __init__(self, *, trials: int | None = None, time_limit_s: float | None = None) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._trials = trials
        self._time_limit_s = time_limit_s
        self._bar: TaskID | None = None
        self._started = time.monotonic()
        self._n_new = self._n_all = self._n_stopped = 0
        self._best: Evaluation | None = None
        self._budget = float("inf")
        self._report = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_phase(self, text: str) -> None:
        """A new part of the work begins."""
        self._report = ""
        if self._bar is not None:
            self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task(text, total=None, status="")
        if not self._console.is_terminal:
            self._console.print(f"{text} ...", highlight=False, soft_wrap=True)

    def on_step(self, done: int, total: int, status: str = "") -> None:
        """`done` of `total` steps of the present part are finished."""
        if self._bar is not None:
            self._progress.update(self._bar, completed=done, total=total, status=status)

    def on_task(self, status: str, done: int, total: int) -> None:
        """A task that has to be made reports its steps."""
        self.on_step(done, total, status)

    def on_probe(self, done: int, total: int) -> None:
        """A single-layer measurement was finished."""
        self.on_step(done, total, f"sensitivity {done}/{total}")

    def on_report(self, text: str) -> None:
        """A strategy says a few words on its state: shown until it says others."""
        self._report = text

    def on_evaluation(self, evaluation: Evaluation, known: bool) -> None:
        """A candidate was evaluated, or answered from the record."""
        if not self._n_all:
            self._started = time.monotonic()
        self._n_all += 1
        self._n_new += not known
        self._n_stopped += evaluation.pruned
        if not evaluation.pruned and (self._best is None or evaluation.loss < self._best.loss):
            self._best = evaluation
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self._n_new / elapsed
        status = f"{rate:.1f}/s"
        if self._best is not None:
            best = f"best loss {self._best.loss:.4g} at {format_size(self._best.size_bytes)}"
            status = f"{best}  {status}"
        if self._n_stopped:
            status += f"  {self._n_stopped} stopped early"
        left = self._seconds_left(elapsed, rate)
        if left is not None:
            status += f"  {format_duration(left)} left"
        if self._report:
            status = f"{self._report}  {status}"
        if self._bar is not None:
            self._progress.update(
                self._bar, completed=self._n_all, total=self._trials, status=status
            )

    def _seconds_left(self, elapsed: float, rate: float) -> float | None:
        by_time = None if self._time_limit_s is None else self._time_limit_s - elapsed
        by_trials = None
        if self._trials is not None and rate > 0:
            by_trials = (self._trials - self._n_all) / rate
        known = [max(0.0, t) for t in (by_time, by_trials) if t is not None]
        return min(known) if known else None
