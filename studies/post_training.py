"""Post-training quality at eight sizes: ResNet-20 on CIFAR-10, weights only, no labels.

    python studies/post_training.py --data DATA [--seed 0] [--test]

Rows are appended to studies/rows/post_training.jsonl and kept: a second call measures only what is
missing. The row of a size is the recovered model of lowest validation loss at or under it. With
--test every packed file is read once on the test split; write the read into TEST_READS.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from quant_ops.candidate import Candidate
from quant_ops.packed import PackedModel
from search.allocation import allocate
from search.config import RunConfig
from search.data import load_split
from search.finish import runner_of
from search.prepare import Prepared, prepare
from search.recovery import Recovery
from search.tasks.table import load_task

TASK = "cifar10-resnet20"
SIZES = (50_000, 60_000, 71_300, 88_000, 104_900, 121_600, 138_400, 171_900)
WIDTHS = (1, 1.6, 2, 3, 4, 5, 6, 8)
PROBE_SAMPLES, SEARCH_SAMPLES = 512, 2_500
HEADER_BYTES = 1_500  # left free by the first program; the exact size decides afterwards
ROWS = Path(__file__).parent / "rows" / "post_training.jsonl"


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/post_training"))
    parser.add_argument("--test", action="store_true")
    arguments = parser.parse_args()
    config = RunConfig(
        task=TASK, recover="full", probe_samples=PROBE_SAMPLES, search_samples=SEARCH_SAMPLES
    )
    prepared = prepare(load_task(TASK, data=arguments.data), config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_rows() if row["seed"] == arguments.seed]
    todo = [size for size in SIZES if size not in {row["size"] for row in rows}]
    if todo:
        losses = distortion_table(prepared, arguments.out / "table.json")
        recovery = Recovery(prepared, seed=arguments.seed)
        for size in todo:
            found = recovery.recover(allocation(prepared, losses, size), "full")
            path = arguments.out / f"{size}-{arguments.seed}.safetensors"
            packed = PackedModel.from_model(found.model)
            packed.save(path)
            steps = [step.to_json() for step in found.steps]
            row = {"size": size, "seed": arguments.seed, "bytes": packed.size_bytes}
            append({**row, "loss": found.loss, "digest": packed.digest, "steps": steps})
            print(size, packed.size_bytes, f"{found.loss:.4g}", flush=True)
    if arguments.test:
        read_test(prepared, arguments.out, arguments.seed)


def distortion_table(prepared: Prepared, path: Path) -> dict[str, dict[float, float]]:
    """Loss with one layer at one width after second-order rounding, the rest float."""
    names = [layer.name for layer in prepared.traced.graph.searchable_layers]
    cells = [(name, width) for name in names for width in WIDTHS]
    if not path.exists():
        candidates = [Candidate.of({name: width}) for name, width in cells]
        measured = [
            m.loss
            for i in range(0, len(cells), 16)
            for m in prepared.evaluator.measure_many(candidates[i : i + 16], "probe")
        ]
        path.write_text(json.dumps(measured))
    table: dict[str, dict[float, float]] = {name: {} for name in names}
    for (name, width), loss in zip(cells, json.loads(path.read_text()), strict=True):
        table[name][width] = loss
    return table


def allocation(prepared: Prepared, losses: dict[str, dict[float, float]], size: int) -> Candidate:
    """The integer program's widths at `size` bytes, header included."""
    graph = prepared.traced.graph
    n_weights = {layer.name: layer.n_weights for layer in graph.searchable_layers}
    values = [np.array([losses[name][w] for w in WIDTHS]) for name in n_weights]
    costs = [np.array([n * w / 8 for w in WIDTHS]) for n in n_weights.values()]
    limit = float(size - HEADER_BYTES)
    while True:
        choice = allocate(values, {"size_bytes": costs}, {"size_bytes": limit})
        assert choice is not None
        widths = {name: WIDTHS[i] for name, i in zip(n_weights, choice, strict=True)}
        candidate = Candidate.of(widths)
        excess = prepared.costs["size_bytes"].cost(graph, candidate) - size
        if excess <= 0:
            return candidate
        limit -= excess


def read_test(prepared: Prepared, out: Path, seed: int) -> None:
    """Every file of this seed on the test split, once."""
    assert prepared.task.test is not None
    judge = prepared.evaluator.new_judge(load_split(prepared.task.test(), what="test"))
    for size in SIZES:
        packed = PackedModel.load(out / f"{size}-{seed}.safetensors")
        metric = judge.measure(runner_of(packed, prepared.traced.out_spec)).metric
        print(size, packed.size_bytes, f"{100 * (metric or 0):.2f} %", flush=True)


def read_rows() -> list[dict[str, object]]:
    """The rows measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def append(row: dict[str, object]) -> None:
    """Keep one row, on disk at once."""
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
