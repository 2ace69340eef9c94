"""Fixed mode of the agents: a channel of ResNet-56 is gone or has 8 bits, at half the operations.

    python studies/fixed_mode.py --data DATA [--minutes 60] [--threads 2] [--test]
    python studies/fixed_mode.py --data DATA --device cuda --minutes 600 --test
    python studies/fixed_mode.py --table

One `search run`: the agents search for channels to prune inside a size and half of the
multiply-accumulates, the best candidate is rounded anew and trained with distillation from the
float network. Rows go to studies/rows/fixed_mode.jsonl; a killed run is resumed. The test split is
read once, by --test.
"""

import argparse
import json
import time
from pathlib import Path

import search
from search.front import ParetoFront
from search.record import Record
from search.report import read_test_split

TASK = "cifar10-resnet56"
SIZE = "684kB"  # a fifth of the float file
MACS = "62.7M"  # half of the float network's
WANTED = 92.7  # % of the test images
ROWS = Path(__file__).parent / "rows" / "fixed_mode.jsonl"


def main() -> None:
    """Measure one row, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--strategy", default="ajpq")
    parser.add_argument("--size", default=SIZE)
    parser.add_argument("--macs", default=MACS)
    parser.add_argument("--bits", default="0,8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/fixed_mode"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    keys = {
        "task": arguments.task,
        "strategy": arguments.strategy,
        "size": arguments.size,
        "macs": arguments.macs,
        "bits": arguments.bits,
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "set": arguments.set,
    }
    folder = arguments.out / f"{arguments.strategy}-{arguments.macs}-{arguments.seed}"
    started = time.monotonic()
    run(folder, arguments)
    seconds = time.monotonic() - started
    front = ParetoFront.load(folder / "front.json")
    if arguments.test and not front.test:
        front = read_test_split(folder)
    keep(keys | outcome(folder, front) | {"seconds": round(seconds, 1)}, keys)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """The search, the rounding and the training, as far as they are not done."""
    if (folder / "front.json").exists() and ParetoFront.load(folder / "front.json").packed:
        return
    search.run(
        arguments.task,
        [arguments.size, f"macs={arguments.macs}"],
        out=folder,
        resume=(folder / "config.json").exists(),
        data=str(arguments.data),
        strategies=(arguments.strategy,),
        granularity="channel",
        bits=tuple(int(b) for b in arguments.bits.split(",")),
        trials=arguments.trials,
        search_samples=arguments.images,
        recover="fast",
        finetune_s=60 * arguments.minutes,
        device=arguments.device,
        threads=arguments.threads,
        seed=arguments.seed,
        settings={
            "recovery.points": "1",
            "finetune.distill": "1.0",
            "finetune.precision": "bfloat16",
            **dict(one.split("=") for one in arguments.set),
        },
    )


def outcome(folder: Path, front: ParetoFront) -> dict:
    """The trained point, and the candidate that the search found for it."""
    evaluations = {e.trial: e for e in Record.open(folder).evaluations()}
    (trained,) = [e for e in evaluations.values() if e.is_trained]
    found = trained
    while found.parent is not None:
        found = evaluations[found.parent]
    return {
        "bytes": trained.size_bytes,
        "macs_left": trained.costs["macs"],
        "found": {"loss": found.loss, "agreement": found.metric},
        "trained": {"loss": trained.loss, "validation": trained.metric},
        "test": front.test.get(trained.trial),
        "float_test": front.info.float_test,
    }


def keep(row: dict, keys: dict) -> None:
    """Put one row in the place of the one with the same keys; a second call takes no time."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for other in rows:
        if all(other[k] == v for k, v in keys.items()) and row["seconds"] < other["seconds"]:
            row = {**row, "seconds": other["seconds"]}
    rows = [other for other in rows if any(other[k] != v for k, v in keys.items())]
    ROWS.write_text("".join(json.dumps(other) + "\n" for other in (*rows, row)))
    print(row)


def print_table() -> None:
    """Every row beside what is wanted of the standard one."""
    print("| strategy | seed | file bytes | MACs | found, agreement | trained, test | minutes |")
    print("|---" * 7 + "|")
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        test = "-" if row["test"] is None else f"{100 * row['test']:.2f} %"
        print(
            f"| {row['strategy']} | {row['seed']} | {row['bytes']:,} | {row['macs_left'] / 1e6:.1f} M "
            f"| {100 * row['found']['agreement']:.1f} % | {test} (wanted {WANTED}) "
            f"| {row['seconds'] / 60:.0f} |"
        )


if __name__ == "__main__":
    main()
