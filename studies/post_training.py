"""Post-training quality at fixed sizes: weights only, no labels, one `search run` for all sizes.

    python studies/post_training.py --data DATA [--task cifar10-resnet20] [--seed 0] [--test]
        [--granularity channel]

Rows are appended to studies/rows/post_training.jsonl and kept: a second call runs only what is
missing, and an interrupted run is resumed. The row of a size is the point of lowest validation
loss at or under it. With --test the frozen front is read once on the test split; write the read
into TEST_READS.md.
"""

import argparse
import json
import time
from pathlib import Path

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
ROWS = Path(__file__).parent / "rows" / "post_training.jsonl"


def main() -> None:
    """Measure what is missing, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=SIZES, default="cifar10-resnet20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/post_training"))
    parser.add_argument("--granularity", choices=("layer", "channel"), default="channel")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--test", action="store_true")
    arguments = parser.parse_args()
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
    known = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for size in SIZES[arguments.task]:
        row = row_at(front, folder, size, seconds)
        row |= {"seed": arguments.seed, "granularity": arguments.granularity}
        if row not in [{**other, "seconds": seconds} for other in known]:
            append(row)
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


def append(row: dict) -> None:
    """Keep one row, on disk at once."""
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
