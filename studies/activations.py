"""Quantized activations at fixed widths, recovered without labels: W8A8, W4A8, W4A4.

    python studies/activations.py --data DATA [--setting W4A4] [--seed 0] [--test]
    python studies/activations.py --table

Widths are those of every layer but the first and last, which have 8 bits, their inputs too. AN is
the width of what enters a layer; values that only a residual sum reads have 8 bits. Rows go to
studies/rows/activations.jsonl; a killed run is resumed.
"""

import argparse
import time
from pathlib import Path

from row_file import RowFile

import search
from quant_ops.edges import activation_edges
from quant_ops.graph import Graph
from quant_ops.operators import LAYER_OPS
from search.capture import trace
from search.front import ParetoFront
from search.report import read_test_split
from search.tasks.table import load_task

SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
ROWS = RowFile("activations")


def main() -> None:
    """Measure one setting, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20")
    parser.add_argument("--setting", choices=SETTINGS, default="W4A4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/activations"))
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    weights, activations = SETTINGS[arguments.setting]
    task = load_task(arguments.task, data=arguments.data)
    graph = trace(task.model, task.examples()).graph
    folder = arguments.out / f"{arguments.task}-{arguments.setting}-{arguments.seed}"
    started = time.monotonic()
    if not (folder / "front.json").exists() or not ParetoFront.load(folder / "front.json").packed:
        search.run(
            arguments.task,
            out=folder,
            resume=(folder / "config.json").exists(),
            data=str(arguments.data),
            strategies=("uniform",),
            bits=(weights,),
            activation_bits=(activations,),
            pins=pins_of(graph),
            recover="full",
            search_samples=2_500,
            seed=arguments.seed,
        )
    seconds = time.monotonic() - started
    front = ParetoFront.load(folder / "front.json")
    if arguments.test and not front.test:
        front = read_test_split(folder)
    (point,) = front.points[-1:]
    row = {
        "task": arguments.task,
        "setting": arguments.setting,
        "seed": arguments.seed,
        "bytes": point.size_bytes,
        "loss": point.loss,
        "validation": point.metric,
        "float_validation": front.info.float_validation,
        "test": front.test.get(point.trial),
        "float_test": front.info.float_test,
        "recipe": point.recipe,
        "seconds": round(seconds, 1),
    }
    ROWS.append(row)
    print(row)


def pins_of(graph: Graph) -> dict[str, float]:
    """First and last layer, the last one's input, and what enters no layer, at 8 bits."""
    first, *_, last = graph.searchable_layers
    pins: dict[str, float] = {first.name: 8.0, last.name: 8.0}
    for edge in activation_edges(graph):
        read_by = [graph.nodes[user] for user in graph.consumers[edge.node]]
        entered = [node for node in read_by if node.op in LAYER_OPS]
        into_last = any(user in last.sites for user in graph.consumers[edge.node])
        if edge.kind == "inner" and (into_last or not entered):
            pins[f"edge:{edge.name}"] = 8.0
    return pins


def print_table() -> None:
    """Every row, test beside the float network's."""
    print("| setting | seed | file bytes | validation loss | validation | test (float) |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        test = "-"
        if row["test"] is not None:
            test = f"{100 * row['test']:.2f} % ({100 * row['float_test']:.2f} %)"
        print(
            f"| {row['setting']} | {row['seed']} | {row['bytes']:,} | {row['loss']:.4f} "
            f"| {100 * row['validation']:.2f} % | {test} |"
        )


if __name__ == "__main__":
    main()
