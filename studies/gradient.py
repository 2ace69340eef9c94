"""Learned widths against uniform quantization-aware training, at equal bytes and minutes.

    python studies/gradient.py [--task digits] [--method diffq] [--seed 0] [--minutes 10]
    python studies/gradient.py --task fashion-mnist --data DATA --method lsq --seed 0
    python studies/gradient.py --table

The sizes are those of uniform 2, 3 and 4 bits. "lsq" trains these uniform widths with learned
steps; the other methods learn widths for the same sizes in the same time. Rows are appended to
studies/rows/gradient.jsonl and kept; a killed run is resumed.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import search
from search.config import RunConfig
from search.dominance import non_dominated
from search.front import ParetoFront
from search.prepare import prepare
from search.record import Record
from search.tasks.table import load_task

BASELINE, WIDTHS = "lsq", (2, 3, 4)
METHODS = (
    BASELINE, "diffq", "bayesian-bits", "dqa", "fracbits", "self-compressing", "csq", "limpq",
)  # fmt: skip
ROWS = Path(__file__).parent / "rows" / "gradient.jsonl"


@dataclass(frozen=True)
class Cell:
    """One row: a method on a task under a seed."""

    task: str
    method: str
    seed: int
    minutes: float

    @property
    def folder(self) -> str:
        return f"{self.task}-{self.method}-{self.seed}-{self.minutes:g}"


def main() -> None:
    """Measure one cell, or print the table of what is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data", default=None)
    parser.add_argument("--method", choices=METHODS, default=BASELINE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(read_rows(), arguments.task)
        return
    cell = Cell(arguments.task, arguments.method, arguments.seed, arguments.minutes)
    keys = {**cell.__dict__}
    if any(all(row[k] == v for k, v in keys.items()) for row in read_rows()):
        print(f"{keys} is measured")
        return
    row = keys | measure(cell, arguments.out / cell.folder, arguments.data, arguments.threads)
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row)


def measure(cell: Cell, folder: Path, data: str | None, threads: int) -> dict:
    """One run; the trained points as (bytes, loss, metric)."""
    started = time.monotonic()
    seconds = cell.minutes * 60
    if cell.method == BASELINE:
        how = {"strategies": ("uniform",), "finetune_s": seconds}
    else:
        how = {"strategies": (cell.method,), "time_limit_s": seconds}
    search.run(
        cell.task,
        [str(size) for size in sizes_of(cell.task, data)],
        out=folder,
        resume=(folder / "config.json").exists(),
        data=data,
        seed=cell.seed,
        threads=threads,
        **how,
    )
    trained = [e for e in Record.open(folder).evaluations() if e.is_trained]
    scale = ParetoFront.load(folder / "front.json").info.scale
    return {
        "hypervolume": scale.hypervolume(trained),
        "front": [(e.size_bytes, e.loss, e.metric) for e in non_dominated(trained)],
        "seconds": round(time.monotonic() - started, 1),
    }


def sizes_of(task: str, data: str | None) -> list[int]:
    """Bytes of the uniform widths."""
    prepared = prepare(load_task(task, data=Path(data) if data else None), RunConfig(task=task))
    cost = prepared.costs["size_bytes"].cost
    space = prepared.space
    return [int(cost(prepared.traced.graph, space.uniform(width))) for width in WIDTHS]


def read_rows() -> list[dict]:
    """All rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def print_table(rows: list[dict], task: str) -> None:
    """Hypervolume of every method beside that of the baseline under the same seeds."""
    rows = [row for row in rows if row["task"] == task]
    baseline = {
        (r["seed"], r["minutes"]): r["hypervolume"] for r in rows if r["method"] == BASELINE
    }
    print("| method | seeds | hypervolume | over uniform LSQ | minutes |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method]
        if not mine:
            continue
        over = [
            r["hypervolume"] - baseline[r["seed"], r["minutes"]]
            for r in mine
            if (r["seed"], r["minutes"]) in baseline
        ]
        mean = statistics.mean(r["hypervolume"] for r in mine)
        gain = f"{statistics.mean(over):+.4f}" if over else "-"
        minutes = statistics.mean(r["seconds"] for r in mine) / 60
        print(f"| {method} | {len(mine)} | {mean:.4f} | {gain} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
