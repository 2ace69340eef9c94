"""What the agents add: cold, warm, joint against two-step, one training for many budgets.

    python studies/ajpq.py --data DATA [--task cifar10-resnet20] [--part cold|warm|budgets]
    python studies/ajpq.py --table [--task cifar10-resnet20]

Every cell (part, method, seed) is one run and one row of studies/rows/ajpq.jsonl; cells that have
a row are skipped, a killed run is resumed. Cold: the method alone. Warm: after uniform widths,
rate-distortion and channel allocation on one record; the gain is over that record. Budgets: one
run that is asked for five sizes, against five runs of a fifth of the evaluations each.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import search
from search.budget import parse_size
from search.dominance import non_dominated
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.record import Record

SEEDS = (0, 1, 2, 3, 4)
METHODS = ("ajpq", "haq", "two-step", "nsga2", "local-search", "random")
COMMON = ("uniform", "rate-distortion", "channel-allocation")  # the record of the warm runs
EVALUATIONS = 200  # of the method; those of the common record come on top
COMMON_EVALUATIONS = 60  # at most, of each common strategy
IMAGES, PROBE_IMAGES = 512, 128
BUDGETS = {
    "cifar10-resnet20": ("50kB", "70kB", "90kB", "110kB", "140kB"),
    "cifar10-resnet56": ("150kB", "200kB", "270kB", "350kB", "430kB"),
    "digits": ("1MB", "1.5MB", "2MB", "3MB", "4MB"),
}
ROWS = Path(__file__).parent / "rows" / "ajpq.jsonl"


def main() -> None:
    """Measure the missing cells, or print the tables of what is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20", choices=BUDGETS)
    parser.add_argument("--part", choices=("cold", "warm", "budgets"))
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ajpq"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_tables(arguments.task)
        return
    for seed in SEEDS[: arguments.seeds]:
        for part in (arguments.part,) if arguments.part else ("cold", "warm", "budgets"):
            methods = ("one run", "five runs") if part == "budgets" else METHODS
            for method in methods if part == "budgets" else chosen(arguments.method):
                measure_cell(arguments, part, method, seed)


def chosen(method: str | None) -> tuple[str, ...]:
    """The method asked for, or all."""
    return METHODS if method is None else (method,)


def measure_cell(arguments: argparse.Namespace, part: str, method: str, seed: int) -> None:
    """Run one cell unless its row is there."""
    keys = {
        "task": arguments.task, "part": part, "method": method, "seed": seed,
        "evaluations": arguments.evaluations, "images": arguments.images,
    }  # fmt: skip
    if any(all(row.get(k) == v for k, v in keys.items()) for row in read_rows()):
        return
    folder = arguments.out / "-".join(str(v) for v in keys.values()).replace(" ", "-")
    started = time.monotonic()
    budgets = BUDGETS[arguments.task]
    if part == "budgets":
        asked = [budgets] if method == "one run" else [(budget,) for budget in budgets]
        n = arguments.evaluations // len(asked)
        strategies = (*COMMON, "ajpq")
        runs = [
            run(arguments, folder / str(i), sizes, strategies, n, seed)
            for i, sizes in enumerate(asked)
        ]
    else:
        strategies = (method,) if part == "cold" else (*COMMON, method)
        runs = [run(arguments, folder, budgets[-1:], strategies, arguments.evaluations, seed)]
    common, found = [], []
    for folder_of_run in runs:
        for evaluation in Record.open(folder_of_run).evaluations():
            (common if evaluation.strategy in COMMON else found).append(evaluation)
    if len(found) > arguments.evaluations:
        raise SystemExit(
            f"{method}: {len(found)} evaluations instead of {arguments.evaluations}, because the "
            f"common strategies' shares were too small to replay them; ask for 200 or more"
        )
    scale = ParetoFront.load(runs[0] / "front.json").info.scale
    row = keys | {
        "hypervolume": scale.hypervolume(common + found),
        "common": scale.hypervolume(common),  # cold agents measure uniform widths too
        "losses": [best_at(common + found, parse_size(budget)) for budget in budgets],
        "front": [(e.size_bytes, e.loss) for e in non_dominated(common + found)],
        "scale": [scale.smallest_bytes, scale.largest_bytes, scale.worst_loss],
        "trials": len(found),
        "seconds": round(time.monotonic() - started, 1),
    }
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if k not in ("front", "scale")}, flush=True)


def run(
    arguments: argparse.Namespace,
    folder: Path,
    budgets: tuple[str, ...],
    strategies: tuple[str, ...],
    evaluations: int,
    seed: int,
) -> Path:
    """One run with widths per channel; the last strategy gets `evaluations`, others what they need.

    Common strategies run first and alone, so that how much they need is known.
    """
    stages = [(strategies, evaluations)]
    if len(strategies) > 1:
        stages.insert(0, (strategies[:-1], COMMON_EVALUATIONS * len(COMMON)))
    for names, n in stages:
        resume = (folder / "config.json").exists()
        known = Record.open(folder).evaluations() if resume else []
        n_common = sum(e.strategy in COMMON for e in known)
        search.run(
            arguments.task,
            budgets,
            out=folder,
            resume=resume,
            data=None if arguments.data is None else str(arguments.data),
            strategies=names,
            trials=n + (n_common if names is strategies and len(names) > 1 else 0),
            seed=seed,
            granularity="channel",
            search_samples=arguments.images,
            probe_samples=PROBE_IMAGES,
            workers=arguments.workers,
            threads=arguments.threads,
        )
    return folder


def best_at(evaluations: list[Evaluation], size_bytes: int) -> float | None:
    """Lowest loss at or under a size."""
    losses = [e.loss for e in evaluations if e.size_bytes <= size_bytes]
    return min(losses, default=None)


def read_rows() -> list[dict]:
    """All rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def print_tables(task: str) -> None:
    """Hypervolumes cold, gains warm, and ajpq's paired difference to every other method."""
    rows = [row for row in read_rows() if row["task"] == task]
    for part in ("cold", "warm", "budgets"):
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        print(f"\n{part}: hypervolume" + (" gained over the common record" * (part != "cold")))
        print("| method | per seed | ajpq minus this, 95 % bootstrap | minutes |")
        print("|---|---|---|---|")
        first = "one run" if part == "budgets" else "ajpq"
        ours = values(mine, first)
        for method in dict.fromkeys(row["method"] for row in mine):
            theirs = values(mine, method)
            minutes = [row["seconds"] / 60 for row in mine if row["method"] == method]
            print(
                f"| {method} | {' '.join(f'{v:.4f}' for v in theirs.values())}",
                "-" if method == first else paired(ours, theirs),
                f"{np.mean(minutes):.1f} |",
                sep=" | ",
            )


def values(rows: list[dict], method: str) -> dict[int, float]:
    """Seed to hypervolume, less that of the common record where there is one."""
    return {
        row["seed"]: row["hypervolume"] - (row["common"] if row["part"] != "cold" else 0.0)
        for row in rows
        if row["method"] == method
    }


def paired(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean difference over common seeds and its interval."""
    differences = np.array([ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())])
    if not len(differences):
        return "-"
    rng = np.random.default_rng(0)
    means = differences[rng.integers(len(differences), size=(10_000, len(differences)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{differences.mean():+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()
