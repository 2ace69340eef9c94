"""Post-training quality at fixed sizes: weights only, no labels, one `search run` for all sizes.

    python studies/post_training.py --data DATA [--task cifar10-resnet20] [--seed 0] [--test]
        [--granularity channel]
    python studies/post_training.py --table

Rows are kept in studies/rows/post_training.jsonl: a second call runs only what is missing, and an
interrupted run is resumed. The row of a size is the point of lowest validation loss at or under
it. With --test the frozen front is read once on the test split; write the read into TEST_READS.md.
"""

import argparse
import time
from pathlib import Path

from row_file import RowFile

import search
from quant_ops.packed import PackedModel
from search.finish import packed_path
from search.front import ParetoFront
from search.report import read_test_split

SIZES = {
    "cifar10-resnet20": (50_000, 60_000, 71_300, 88_000, 104_900, 121_600, 138_400, 171_900),
    # the same mean widths, roughly
    "cifar10-resnet56": (157_000, 224_000, 330_000, 435_000),
    "fashion-mnist": (10_000, 14_000, 20_000, 27_000),
}
TRIALS = 60  # evaluations before recovery; the tables are measured besides
SEARCH_SAMPLES = 2_500
ROWS = RowFile("post_training")
KEYS = ("task", "granularity", "size", "seed")
# the best that existing tools are known to reach, and what is wanted here: % of the test images
WANTED = dict(
    zip(
        SIZES["cifar10-resnet20"],
        (87.5, 89.5, 90.7, 91.1, 91.4, 91.5, 91.6, 91.7),
        strict=True,
    )
)


def main() -> None:
    """Measure what is missing, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", choices=SIZES, default="cifar10-resnet20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/post_training"))
    parser.add_argument("--granularity", choices=("layer", "channel"), default="channel")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    folder = arguments.out / f"{arguments.task}-{arguments.granularity}-{arguments.seed}"
    seconds = 0.0
    if not (folder / "front.json").exists() or not ParetoFront.load(folder / "front.json").packed:
        started = time.monotonic()
        search.run(
            arguments.task,
            [str(size) for size in SIZES[arguments.task]],
            out=folder,
            resume=(folder / "config.json").exists(),
            data=str(arguments.data),
            recover="full",
            granularity=arguments.granularity,
            settings={"auto.points": "8"},
            trials=TRIALS,
            threads=arguments.threads,
            search_samples=SEARCH_SAMPLES,
            seed=arguments.seed,
        )
        seconds = time.monotonic() - started
    front = ParetoFront.load(folder / "front.json")
    if arguments.test and not front.test:
        front = read_test_split(folder)
    for size in SIZES[arguments.task]:
        row = row_at(front, folder, size, seconds)
        row |= {"seed": arguments.seed, "granularity": arguments.granularity}
        ROWS.replace(row, KEYS)
        test = row["test"]
        print(
            size,
            row["bytes"],
            f"{row['loss']:.4g}",
            f"{100 * row['validation']:.2f} %",
            "-" if test is None else f"{100 * test:.2f} %",
        )


def row_at(front: ParetoFront, folder: Path, size: int, seconds: float) -> dict:
    """What the point of lowest validation loss at or under `size` is and does."""
    point = front.best(size)
    return {
        "task": front.info.task,
        "size": size,
        "bytes": point.size_bytes,
        "trial": point.trial,
        "recipe": point.recipe,
        "loss": point.loss,
        "validation": point.metric,
        "test": front.test.get(point.trial),
        "digest": PackedModel.load(packed_path(folder, point.trial)).digest,
        "seconds": round(seconds, 1),
    }


def print_table() -> None:
    """Test accuracy of every size and seed, mean and margin over what is wanted."""
    rows = list(ROWS)
    for task, granularity in dict.fromkeys((r["task"], r["granularity"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["granularity"]) == (task, granularity)]
        seeds = sorted({r["seed"] for r in mine})
        print(f"\n{task}, {granularity}, {max(r['seconds'] for r in mine) / 60:.0f} min a run\n")
        print("| size | bytes | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | wanted |")
        print("|---" * (len(seeds) + 4) + "|")
        for size in SIZES[task]:
            found = [r for r in mine if r["size"] == size and r["test"] is not None]
            tests = {r["seed"]: 100 * r["test"] for r in found}
            if not tests:
                continue
            cells = [f"{tests[s]:.2f}" if s in tests else "-" for s in seeds]
            wanted = f"{WANTED[size]:.1f}" if task == "cifar10-resnet20" else "-"
            print(
                f"| {size:,} | {max(r['bytes'] for r in found):,} | {' | '.join(cells)} "
                f"| {sum(tests.values()) / len(tests):.2f} | {wanted} |"
            )


if __name__ == "__main__":
    main()
