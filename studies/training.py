"""Quantization-aware training of one point: the long rows of ResNet-20, weights only or W4A4.

    python studies/training.py --data DATA [--row 50kB] [--seed 0] [--minutes 60] [--test]
    python studies/training.py --data DATA --row W4A4 --device cuda --minutes 60
    python studies/training.py --table

One `search run`: widths per channel, recovery without labels, then training at these widths with
distillation from the float network, a fixed recipe, the averaged weights of its last step. Rows
go to studies/rows/training.jsonl; a killed run is resumed. The float network of the task has seen
the validation images in training, so its validation loss says how near the float network is, and
the test split is read once by --test.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from activations import pins_of
from row_file import RowFile

import search
from search.capture import trace
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.record import Record
from search.report import read_test_split
from search.tasks.table import load_task

TASK = "cifar10-resnet20"
ROWS = RowFile("training")


@dataclass(frozen=True)
class Row:
    """A size, the widths of activations (0: float), and the test accuracy that is wanted."""

    size: int
    wanted: float
    activation_bits: int = 0


ROWS_WANTED = {
    "67kB": Row(67_400, 91.5),
    "50kB": Row(50_000, 90.9),
    "40kB": Row(40_000, 89.0),
    "W4A4": Row(140_000, 91.3, activation_bits=4),
}


def main() -> None:
    """Measure one row, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--row", choices=ROWS_WANTED, default="50kB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    folder = arguments.out / f"{arguments.row}-{arguments.seed}"
    started = time.monotonic()
    train(ROWS_WANTED[arguments.row], folder, arguments)
    seconds = time.monotonic() - started
    front = ParetoFront.load(folder / "front.json")
    if arguments.test and not front.test:
        front = read_test_split(folder)
    row = {"row": arguments.row, "seed": arguments.seed, "set": arguments.set}
    row |= outcome(folder, front) | {"seconds": round(seconds, 1)}
    print(ROWS.replace(row, ("row", "seed", "set")))


def train(row: Row, folder: Path, arguments: argparse.Namespace) -> None:
    """The run, as far as it is not done."""
    if (folder / "front.json").exists() and ParetoFront.load(folder / "front.json").packed:
        return
    asked = dict(s.split("=") for s in arguments.set)
    how: dict = {
        "granularity": "channel",
        "strategies": ("channel-allocation",),
        "settings": {"recovery.points": "1", "channel-allocation.points": "2", **asked},
    }
    if row.activation_bits:
        task = load_task(TASK, data=arguments.data)
        pins = pins_of(trace(task.model, task.examples()).graph)
        how |= {"activation_bits": (row.activation_bits,), "pins": pins}
        how |= {"bits": (4,), "strategies": ("uniform",), "granularity": "layer"}
        how["settings"] = {"recovery.points": "1", **asked}
    search.run(
        TASK,
        [str(row.size)],
        out=folder,
        resume=(folder / "config.json").exists(),
        data=str(arguments.data),
        recover="full",
        finetune_s=60 * arguments.minutes,
        device=arguments.device,
        search_samples=2_500,
        threads=arguments.threads,
        seed=arguments.seed,
        **how,
    )


def outcome(folder: Path, front: ParetoFront) -> dict:
    """The trained point beside the recovered one that it started from."""
    evaluations = {e.trial: e for e in Record.open(folder).evaluations()}
    (trained,) = [e for e in evaluations.values() if e.is_trained]
    parent = evaluations[trained.parent]
    facts: dict = {}
    for name, point in (("recovered", parent), ("trained", trained)):
        facts[name] = measured(point, front)
    return {"bytes": trained.size_bytes, **facts, "float_test": front.info.float_test}


def measured(point: Evaluation, front: ParetoFront) -> dict:
    """Loss, agreement with labels on validation, and test accuracy where it was read."""
    return {"loss": point.loss, "validation": point.metric, "test": front.test.get(point.trial)}


def print_table() -> None:
    """Every row beside what is wanted."""
    print(
        "| row | recipe | seed | file bytes | recovered, test | trained, test | wanted | minutes |"
    )
    print("|---" * 8 + "|")
    for row in ROWS:
        recipe = ", ".join(one.removeprefix("finetune.") for one in row["set"])
        tests = (row["recovered"]["test"], row["trained"]["test"])
        before, after = ("-" if x is None else f"{100 * x:.2f} %" for x in tests)
        print(
            f"| {row['row']} | {recipe} | {row['seed']} | {row['bytes']:,} | {before} | {after} "
            f"| {ROWS_WANTED[row['row']].wanted} % | {row['seconds'] / 60:.0f} |"
        )


if __name__ == "__main__":
    main()
