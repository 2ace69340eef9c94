"""Learned widths against uniform quantization-aware training, at equal bytes and training time.

    python studies/gradient.py [--task digits-mlp] [--seed 0,1,2,3,4] [--minutes 0.15]
    python studies/gradient.py --task fashion-mnist --data DATA --method lsq,hgq --seed 0
    python studies/gradient.py [--task digits-mlp] --table

The sizes are those of uniform 2, 3 and 4 bits. "lsq" trains these uniform widths with learned
steps; the other methods learn widths for the same sizes. Minutes are those of the training alone,
on one thread of an idle machine: the CPU time of a step is measured once for each task and method
(rows/gradient_pace.jsonl), and says how many steps every seed gets. A seed is that of the float
network, of the order of the data and of the noise. Hypervolumes are of the finished points, one
for each size and taken at the size asked for, since a byte that stays unused would weigh more than
the losses do; points recorded on the way do not count, as the baseline has none. Rows are appended
to rows/gradient.jsonl and kept; a killed run is resumed.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from row_file import RowFile
from scipy.stats import t as student

import search
from search.config import RunConfig
from search.context import Listener
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.prepare import prepare
from search.record import Record
from search.task import Task
from search.tasks.table import load_task

BASELINE, WIDTHS = "lsq", (2, 3, 4)
METHODS = (
    BASELINE, "hgq", "diffq", "bayesian-bits", "dqa", "fracbits", "self-compressing", "csq",
    "limpq",
)  # fmt: skip
ROWS = RowFile("gradient")
PACE = RowFile("gradient_pace")
PACE_STEPS = 24  # of each size: enough for a median of both parts
WHOLE_VALIDATION = 100_000  # --search-samples: more than any validation split holds


@dataclass(frozen=True)
class Cell:
    """One row: a method on a task under a seed, and minutes of training for the three sizes."""

    task: str
    method: str
    seed: int
    minutes: float

    @property
    def folder(self) -> str:
        """Of the run."""
        return f"{self.task}-{self.method}-{self.seed}-{self.minutes:g}"


class Stopwatch(Listener):
    """CPU seconds between two steps of one part of a training, part by part."""

    def __init__(self) -> None:
        self.gaps: list[list[float]] = []
        self._last: float | None = None

    def on_phase(self, text: str) -> None:
        """What follows is another part."""
        self._last = None

    def on_step(self, done: int, total: int, status: str = "") -> None:
        """Steps of checks have no loss."""
        now = time.process_time()
        if not status.startswith("loss"):
            return
        if self._last is None:
            self.gaps.append([])
        else:
            self.gaps[-1].append(now - self._last)
        self._last = now

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(map(sum, self.gaps))

    def per_step(self, parts: int) -> float:
        """Seconds of a step, where each size has `parts` parts of as many steps: of the same part
        of different sizes the quickest median counts, which other work disturbed least."""
        medians = [statistics.median(part) for part in self.gaps]
        return statistics.fmean(min(medians[part::parts]) for part in range(parts))


def main() -> None:
    """Measure what is asked for and missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits-mlp")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--method", default="all")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--minutes", type=float, default=0.15)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(list(ROWS), arguments.task)
        return
    methods = METHODS if arguments.method == "all" else arguments.method.split(",")
    for seed in map(int, arguments.seed.split(",")):
        task = load_task(arguments.task, data=arguments.data, seed=seed)
        for method in methods:
            cell = Cell(arguments.task, method, seed, arguments.minutes)
            if any(asdict(cell).items() <= row.items() for row in ROWS):
                continue
            row = asdict(cell) | measure(cell, task, arguments.out)
            ROWS.append(row)
            print(row, flush=True)


def measure(cell: Cell, task: Task, out: Path) -> dict:
    """One run; the finished points as (bytes, loss, metric)."""
    seconds = seconds_per_step(cell, task, out)
    steps = max(2, round(cell.minutes * 60 / (len(WIDTHS) * seconds)))
    started, watch = time.process_time(), Stopwatch()
    found = run(cell, task, out / cell.folder, steps, watch)
    scale = ParetoFront.load(out / cell.folder / "front.json").info.scale
    at_size = [
        replace(e, costs={"size_bytes": float(size)})
        for size, e in zip(sizes_of(task), found, strict=True)
    ]
    return {
        "hypervolume": round(scale.hypervolume(at_size), 6),
        "points": [(e.size_bytes, round(e.loss, 6), e.metric) for e in found],
        "steps_of_a_size": steps,
        "ms_per_step": round(1e3 * seconds, 3),
        "training_cpu_s": round(watch.seconds, 1),
        "run_cpu_s": round(time.process_time() - started, 1),
        "date": str(date.today()),
    }


def seconds_per_step(cell: Cell, task: Task, out: Path) -> float:
    """CPU seconds of a training step, mean of both parts; measured where it is not known."""
    key = {"task": cell.task, "method": cell.method}
    for row in PACE:
        if key.items() <= row.items():
            return float(row["ms_per_step"]) / 1e3
    watch = Stopwatch()
    folder = out / f"pace-{cell.task}-{cell.method}-{time.time():.0f}"
    run(cell, task, folder, PACE_STEPS, watch, {"harvest": "0"})
    seconds = watch.per_step(1 if cell.method == BASELINE else 2)
    PACE.append(key | {"ms_per_step": round(1e3 * seconds, 3), "date": str(date.today())})
    return seconds


def run(
    cell: Cell,
    task: Task,
    folder: Path,
    steps: int,
    watch: Stopwatch,
    settings: Mapping[str, str] | None = None,
) -> list[Evaluation]:
    """The finished points of a run, smallest first."""
    if cell.method == BASELINE:
        strategy, given = "uniform", {"finetune.steps": str(steps)}
    else:
        strategy, given = cell.method, {"steps": str(steps), **(settings or {})}
        given = {f"{cell.method}.{key}": value for key, value in given.items()}
    search.run(
        task,
        [str(size) for size in sizes_of(task)],
        out=folder,
        resume=(folder / "config.json").exists(),
        listener=watch,
        strategies=(strategy,),
        settings=given,
        seed=cell.seed,
        threads=1,
        search_samples=WHOLE_VALIDATION,
    )
    recipe = "finetune" if cell.method == BASELINE else cell.method
    finished = [e for e in Record.open(folder).evaluations() if e.recipe == recipe]
    assert len(finished) == len(WIDTHS)
    return sorted(finished, key=lambda e: e.size_bytes)


def sizes_of(task: Task) -> list[int]:
    """Bytes of the uniform widths."""
    prepared = prepare(task, RunConfig(task=task.name))
    cost = prepared.costs["size_bytes"].cost
    graph, space = prepared.traced.graph, prepared.space
    return [int(cost(graph, space.uniform(width))) for width in WIDTHS]


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t); nan for a single value."""
    if len(values) < 2:
        return math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(student.ppf(0.975, len(values) - 1)) * spread


def print_table(rows: list[dict], task: str) -> None:
    """Every method beside the baseline under the same seeds, for each number of minutes."""
    for minutes in sorted({row["minutes"] for row in rows if row["task"] == task}):
        here = [row for row in rows if row["task"] == task and row["minutes"] == minutes]
        baseline = {row["seed"]: row for row in here if row["method"] == BASELINE}
        print(f"\n{task}, {minutes:g} minutes of training\n")
        print(
            "| method | ms/step | steps of a size | losses at 2, 3, 4 bits | hypervolume "
            "| over LSQ, x 1000 | seeds ahead | run, CPU s |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for method in METHODS:
            mine = [row for row in here if row["method"] == method]
            if mine:
                print(line_of(method, mine, baseline))


def line_of(method: str, mine: list[dict], baseline: Mapping[int, dict]) -> str:
    """One line of the table; the interval is that of the paired differences."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in mine)

    losses = zip(*([loss for _, loss, _ in row["points"]] for row in mine), strict=True)
    over = [
        row["hypervolume"] - baseline[row["seed"]]["hypervolume"]
        for row in mine
        if row["seed"] in baseline and method != BASELINE
    ]
    gain, ahead = "", ""
    if over:
        gain = f"{1e3 * statistics.fmean(over):+.2f} ± {1e3 * interval(over):.2f}"
        ahead = f"{sum(gap > 0 for gap in over)} of {len(over)}"
    return (
        f"| {method} | {mean('ms_per_step'):.1f} | {mean('steps_of_a_size'):.0f} "
        f"| {', '.join(f'{statistics.fmean(at):.4f}' for at in losses)} "
        f"| {mean('hypervolume'):.4f} | {gain} | {ahead} | {mean('run_cpu_s'):.0f} |"
    )


if __name__ == "__main__":
    main()
