"""Front quality per evaluation: hypervolume of each strategy on the same fixed images.

    python studies/fronts.py --data DATA [--task cifar10-resnet20] [--method auto-100] [--seed 0]
    python studies/fronts.py --table

Rows are appended to studies/rows/fronts.jsonl and kept; a killed run is resumed. A probe of a
sensitivity table counts as probe images / judged images of an evaluation, although it takes less
time than that: what probes have in common is computed once.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from row_file import RowFile

import search
from quant_ops.candidate import Candidate
from search.config import RunConfig
from search.dominance import HypervolumeScale, non_dominated
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.prepare import prepare
from search.record import Record
from search.tasks.table import load_task

IMAGES = 512
ROWS = RowFile("fronts")


@dataclass(frozen=True)
class Method:
    """A strategy and the evaluations it may spend, its table's probes included."""

    strategy: str
    evaluations: int
    probe_images: int = 64


METHODS = {
    "uniform": Method("uniform", 100),
    "auto-100": Method("auto", 100),
    "nsga2-100": Method("nsga2", 100),
    "tpe-100": Method("tpe", 100),
    "random-100": Method("random", 100),
    "nsga2-2000": Method("nsga2", 2000),
    "auto-2000": Method("auto", 2000, probe_images=512),
}


def main() -> None:
    """Measure one cell, or print the table of what is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20")
    parser.add_argument("--method", choices=METHODS, default="auto-100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fronts"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(list(ROWS), arguments.task)
        return
    keys = {"task": arguments.task, "method": arguments.method, "seed": arguments.seed}
    if any(all(row[k] == v for k, v in keys.items()) for row in ROWS):
        print(f"{keys} is measured")
        return
    folder = arguments.out / "-".join(str(v) for v in keys.values())
    row = keys | measure(folder, arguments)
    ROWS.append(row)
    print({k: v for k, v in row.items() if k != "front"})


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    """One run; the front as (bytes, loss) pairs on the judged images."""
    method = METHODS[arguments.method]
    started = time.monotonic()
    # probes are known beforehand: one per searched layer and width, 0 bits and ternary included
    trials = method.evaluations - n_probes(arguments) * method.probe_images // IMAGES
    if method.strategy not in ("auto", "rate-distortion"):
        trials = method.evaluations
    search.run(
        arguments.task,
        out=folder,
        resume=(folder / "config.json").exists(),
        data=str(arguments.data),
        strategies=(method.strategy,),
        trials=trials,
        seed=arguments.seed,
        search_samples=IMAGES,
        probe_samples=method.probe_images,
        threads=arguments.threads,
        early_stop=False,  # an evaluation is an evaluation
    )
    front = ParetoFront.load(folder / "front.json")
    evaluations = Record.open(folder).evaluations()
    log = folder / "probes.jsonl"
    probes = len(log.read_text().splitlines()) if log.exists() else 0
    scale = front.info.scale
    return {
        "probes": probes,
        "trials": len(evaluations),
        "evaluations": round(len(evaluations) + probes * method.probe_images / IMAGES, 1),
        "hypervolume": scale.hypervolume(evaluations),
        "front": [(e.size_bytes, e.loss) for e in non_dominated(evaluations)],
        "scale": [scale.smallest_bytes, scale.largest_bytes, scale.worst_loss],
        "seconds": round(time.monotonic() - started, 1),
    }


def n_probes(arguments: argparse.Namespace) -> int:
    """How many probes the task's table needs."""
    config = RunConfig(task=arguments.task, data=str(arguments.data))
    space = prepare(load_task(arguments.task, data=arguments.data), config).space
    return sum(len(c.bit_widths) for c in space.layers if len(c.bit_widths) > 1)


def print_table(rows: list[dict], task: str) -> None:
    """Hypervolume and share of the gap between uniform and the union, per method."""
    rows = [row for row in rows if row["task"] == task]
    scale = HypervolumeScale(*rows[0]["scale"])
    fronts = {(r["method"], r["seed"]): as_evaluations(r["front"]) for r in rows}
    union = [e for front in fronts.values() for e in front]
    (uniform,) = (front for (method, _), front in fronts.items() if method == "uniform")
    print("| method | evaluations | hypervolume per seed | share of the gap closed | minutes |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
        if not mine:
            continue
        shares = [
            scale.share_of_gap(fronts[method, r["seed"]], baseline=uniform, union=union)
            for r in mine
        ]
        print(
            f"| {method} | {max(r['evaluations'] for r in mine):g}",
            " ".join(f"{r['hypervolume']:.4f}" for r in mine),
            " ".join(f"{100 * (share or 0):.1f} %" for share in shares),
            f"{np.mean([r['seconds'] for r in mine]) / 60:.1f} |",
            sep=" | ",
        )


def as_evaluations(front: list[list[float]]) -> list[Evaluation]:
    """Evaluations of given sizes and losses, for the hypervolume."""
    return [
        Evaluation(Candidate.of({}, {}), loss=loss, metric=None, costs={"size_bytes": size})
        for size, loss in front
    ]


if __name__ == "__main__":
    main()
