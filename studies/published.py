"""What is claimed for pruning and quantizing in one step, redone on ResNet-56 by the agents alone.

    python studies/published.py --data DATA --mode fixed [--minutes 60] [--threads 2] [--test]
    python studies/published.py --data DATA --mode fixed --device cuda --minutes 600 --test
    python studies/published.py --data DATA --mode mixed [--test]
    python studies/published.py --table

Fixed: a channel is gone or has 8 bits. The agents search inside a fifth of the bytes and half of
the multiply-accumulates; the best candidate is rounded anew and trained with distillation from the
float network. Mixed: 0 to 8 bits per channel, four sizes, recovery without labels. Each is one
`search run`; rows go to studies/rows/published.jsonl; a killed run is resumed. The test split is
read once, by --test.
"""

import argparse
import time
from pathlib import Path

from row_file import RowFile

import search
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.record import Record
from search.report import read_test_split

TASK = "cifar10-resnet56"
FLOAT_BYTES = 3_412_072  # of its file
MACS = "62.7M"  # half of its operations
TIMES = {5: 0.0, 8: 0.2, 12: 0.5, 16: 1.0}  # smaller: points of the test accuracy that may be lost
FIXED_WANTED = 92.7  # % of the test images
ROWS = RowFile("published")
KEYS = ("task", "mode", "size", "seed", "minutes", "set")


def main() -> None:
    """Measure one mode, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--mode", choices=("fixed", "mixed"), default="fixed")
    parser.add_argument("--macs", default=MACS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    folder = arguments.out / f"{arguments.task}-{arguments.mode}-{arguments.seed}"
    started = time.monotonic()
    run(folder, arguments)
    seconds = time.monotonic() - started
    front = ParetoFront.load(folder / "front.json")
    asked = sizes(arguments.mode, folder)
    if arguments.test and not front.test:
        trials = {chosen(size, front, arguments.mode).trial for size in asked}
        front = read_test_split(folder, trials=trials)
    for size in asked:
        row = row_at(size, folder, front, arguments) | {"seconds": round(seconds, 1)}
        print(ROWS.replace(row, KEYS))


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """The search and what follows it, as far as it is not done."""
    if (folder / "front.json").exists() and ParetoFront.load(folder / "front.json").packed:
        return
    how: dict = {"recover": "full", "settings": {"recovery.points": str(len(TIMES))}}
    budgets = [str(size) for size in sizes(arguments.mode, folder)]
    if arguments.mode == "fixed":
        budgets.append(f"macs={arguments.macs}")
        training = {"finetune.distill": "1.0", "finetune.precision": "bfloat16"}
        how = {"bits": (0, 8), "recover": "fast", "finetune_s": 60 * arguments.minutes}
        how["settings"] = {"recovery.points": "1", **training}
    how["settings"] |= dict(one.split("=") for one in arguments.set)
    search.run(
        arguments.task,
        budgets,
        out=folder,
        resume=(folder / "config.json").exists(),
        data=str(arguments.data),
        strategies=("ajpq",),
        granularity="channel",
        trials=arguments.trials,
        search_samples=arguments.images,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        **how,
    )


def sizes(mode: str, folder: Path) -> list[int]:
    """Bytes that are asked for; those of ResNet-56 before a run is there."""
    path = folder / "front.json"
    whole = ParetoFront.load(path).info.float_size_bytes if path.exists() else FLOAT_BYTES
    return [whole // n for n in TIMES][: 1 if mode == "fixed" else None]


def chosen(size: int, front: ParetoFront, mode: str) -> Evaluation:
    """The point of lowest validation loss at or under a size, of trained ones in fixed mode."""
    points = [p for p in front.points if p.size_bytes <= size and p.is_trained == (mode == "fixed")]
    return min(points, key=lambda p: p.loss)


def row_at(size: int, folder: Path, front: ParetoFront, arguments: argparse.Namespace) -> dict:
    """The point of a size, and the candidate of the search that it comes from."""
    point = chosen(size, front, arguments.mode)
    evaluations = {e.trial: e for e in Record.open(folder).evaluations()}
    found = evaluations[point.trial]
    while found.parent is not None:
        found = evaluations[found.parent]
    return {
        "task": arguments.task,
        "mode": arguments.mode,
        "size": size,
        "seed": arguments.seed,
        "minutes": arguments.minutes if arguments.mode == "fixed" else None,
        "set": arguments.set,
        "bytes": point.size_bytes,
        "macs": point.costs["macs"],
        "found": {"strategy": found.strategy, "loss": found.loss, "agreement": found.metric},
        "loss": point.loss,
        "validation": point.metric,
        "recipe": point.recipe,
        "test": front.test.get(point.trial),
        "float_test": front.info.float_test,
        "float_bytes": front.info.float_size_bytes,
    }


def print_table() -> None:
    """Every row beside what is wanted."""
    print("| mode | seed | file bytes | smaller | MACs | as found | test | wanted | minutes |")
    print("|---" * 9 + "|")
    for row in ROWS:
        wanted = FIXED_WANTED
        if row["mode"] == "mixed":
            times = round(row["float_bytes"] / row["size"])
            wanted = 100 * row["float_test"] - TIMES[times] if row["float_test"] else float("nan")
        test = "-" if row["test"] is None else f"{100 * row['test']:.2f} %"
        print(
            f"| {row['mode']} | {row['seed']} | {row['bytes']:,} "
            f"| {row['float_bytes'] / row['bytes']:.1f}x | {row['macs'] / 1e6:.1f} M "
            f"| {100 * row['found']['agreement']:.1f} % | {test} | {wanted:.2f} % "
            f"| {row['seconds'] / 60:.0f} |"
        )


if __name__ == "__main__":
    main()
