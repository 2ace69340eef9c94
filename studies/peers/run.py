"""Existing tools on the sizes of studies/post_training.py: weights only, no labels, no training.

    python studies/peers/run.py --data DATA [--only TOOL ...] [--seed 0] [--test] [--table]

Run in an environment of its own (README beside this file), with this project's root on
PYTHONPATH. One row per (tool, size, seed) in studies/rows/peers.jsonl; rows are kept, a second call
measures what is missing. --table prints the rows beside this project's. With --test each row that
has none gets the test metric once, and the read is noted in studies/TEST_READS.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import vision_operators
from mct_integer import mct, mct_gptq
from modelopt_auto import modelopt_gradient, modelopt_kl
from network import Bench, PeerNetwork, measure
from uniform import uniform_mse, uniform_nearest

SIZES = {"cifar10-resnet20": (50_000, 60_000, 71_300, 88_000, 104_900, 121_600, 138_400, 171_900)}
TOOLS: dict[str, tuple[Callable[[Bench, int, int], PeerNetwork | None], str]] = {
    "uniform nearest": (uniform_nearest, "torch"),
    "uniform MSE": (uniform_mse, "torch"),
    "modelopt gradient": (modelopt_gradient, "nvidia-modelopt"),
    "modelopt KL": (modelopt_kl, "nvidia-modelopt"),
    "mct": (mct, "model_compression_toolkit"),
    "mct GPTQ": (mct_gptq, "model_compression_toolkit"),
}
DEFAULT_TOOLS = ("uniform nearest", "uniform MSE", "modelopt gradient", "mct")
STUDIES = Path(__file__).parent.parent
ROWS, OUR_ROWS = STUDIES / "rows" / "peers.jsonl", STUDIES / "rows" / "post_training.jsonl"
TEST_READS = STUDIES / "TEST_READS.md"

Row = dict


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", choices=SIZES, default="cifar10-resnet20")
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=DEFAULT_TOOLS, metavar="TOOL")
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.task, read(ROWS), read(OUR_ROWS)))
        return
    if arguments.data is None:
        parser.error("--data is needed to measure")
    torch.set_num_threads(arguments.threads)
    vision_operators.declare()
    bench = Bench.load(arguments.task, arguments.data)
    for size in arguments.sizes or SIZES[arguments.task]:
        for tool in arguments.only:
            cell = {"task": arguments.task, "tool": tool, "size": size, "seed": arguments.seed}
            known = latest(read(ROWS), cell)
            is_missing = known is None or (
                arguments.test and known["bytes"] is not None and known["test"] is None
            )
            if is_missing:
                row = measured(bench, cell, with_test=arguments.test)
                append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)


def measured(bench: Bench, cell: Row, *, with_test: bool) -> Row:
    """The row of one cell; `bytes` is None where the tool cannot reach the size.

    Raises:
        ValueError: a layer is not quantized as stated, or the network is larger than the size.
    """
    make, package = TOOLS[cell["tool"]]
    started = time.monotonic()
    network = make(bench, cell["size"], cell["seed"])
    seconds = round(time.monotonic() - started, 1)
    row = {**cell, "package": f"{package} {version(package)}", "date": str(date.today())}
    if network is None:
        return {**row, "bytes": None}
    network.check(bench.layers)
    if network.size_bytes > cell["size"]:
        raise ValueError(
            f"{cell['tool']} was given {cell['size']:,} bytes and used {network.size_bytes:,}"
        )
    quality = measure(bench.validation, network)
    row |= {
        "bytes": network.size_bytes,
        "bit_widths": [weight.bit_width for weight in network.weights.values()],
        "levels": [weight.most_levels for weight in network.weights.values()],
        "loss": quality.loss,
        "validation": quality.metric,
        "test": None,
        "seconds": seconds,
    }
    if with_test:
        row["test"] = bench.measure_test(network)
        note_read(row)
    return row


def note_read(row: Row) -> None:
    """One line for one read of the labelled test split."""
    what = f"{row['tool']} at {row['size']:,} bytes, seed {row['seed']}"
    told = subprocess.run(
        ["git", "-C", STUDIES, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    commit = told.stdout.strip() or "-"
    line = f"| {row['date']} | {commit} | {row['task']} | {what} | row of `studies/peers` |\n"
    with TEST_READS.open("a") as file:
        file.write(line)


def table(task: str, rows: Iterable[Row], ours: Iterable[Row]) -> str:
    """Markdown: a line per size, a column per tool and one for this project's front.

    A cell is the metric, test where it was read and validation (v) where not, averaged over seeds.
    """
    rows = [row for row in rows if row["task"] == task]
    tools = [tool for tool in TOOLS if any(row["tool"] == tool for row in rows)]
    lines = [["size, bytes", *tools, "bitfront"], ["---"] * (len(tools) + 2)]
    for size in SIZES[task]:
        cells = []
        for tool in tools:
            wanted = [row for row in rows if (row["tool"], row["size"]) == (tool, size)]
            cells.append(mean_metric(of_seeds(wanted)))
        mine = [r for r in ours if r.get("task", task) == task and r["size"] == size]
        lines.append([f"{size:,}", *cells, mean_metric(of_seeds(mine))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_seeds(rows: Iterable[Row]) -> list[Row]:
    """The last row of every seed."""
    return list({row["seed"]: row for row in rows}.values())


def mean_metric(rows: list[Row]) -> str:
    """Percent, with the number of seeds where there are several; "-" where none can be reached."""
    if not rows:
        return "not measured"
    rows = [row for row in rows if row.get("bytes")]
    if not rows:
        return "-"
    tested = all(row.get("test") is not None for row in rows)
    values = [row["test" if tested else "validation"] for row in rows]
    several = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
    return f"{100 * sum(values) / len(values):.2f}{'' if tested else ' v'}{several}"


def latest(rows: Iterable[Row], cell: Row) -> Row | None:
    """The last row of a cell."""
    found = [row for row in rows if all(row[key] == value for key, value in cell.items())]
    return found[-1] if found else None


def read(path: Path) -> list[Row]:
    """Rows on disk; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(row: Row) -> None:
    """Keep one row, on disk at once."""
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
