"""Three budgets at once on three tasks: what was predicted beside what is measured.

    python studies/budgets.py --data DATA [--task digits-mlp|fashion-mnist|cifar10-resnet20]
    python studies/budgets.py --table

Each task is searched briefly under three limits, and the best point that meets them in prediction
is measured: bytes of its file; LUTs and registers of its exported Verilog, by yosys; the arena of
its exported C library; the time of its whole network in ONNX Runtime. Rows, one per task and
budget, go to studies/rows/budgets.jsonl; a task whose rows are there is not run again.
"""

import argparse
import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from row_file import RowFile

import search
from cost_models.fpga.families import family
from cost_models.fpga.synthesis import pipelined, synthesize
from cost_models.latency.measure import Plan
from cost_models.latency.model import Latency
from cost_models.latency.onnxruntime_backend import OnnxRuntime
from cost_models.latency.table import load_table
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from search.budget import Budgets
from search.evaluation import Evaluation
from search.exporters.c.memory import lay_out
from search.exporters.c.project import generate
from search.exporters.unrolled import unroll
from search.front import ParetoFront
from search.latency import find_table
from search.profiling import check_candidates, profile
from search.task import Task
from search.tasks.table import load_task

SEED, FAMILY = 0, "xc7"
ROWS = RowFile("budgets")
YOSYS_S = 3600.0
# Task to its limits and the settings of its search.
SEARCHES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "digits-mlp": (
        ("1300", "lut=10500", "ff=9000"),
        {"bits": (1, 1.6, 2, 3), "activation_bits": (3, 4, 6), "trials": 60, "fpga": FAMILY},
    ),
    "fashion-mnist": (
        ("50kB", "ram=20kB", "latency=0.3ms"),
        {"bits": (2, 3, 4, 8), "activation_bits": (8,), "trials": 12, "search_samples": 256,
         "distortion": "linearized"},
    ),
    "cifar10-resnet20": (
        ("140kB", "ram=50kB", "latency=1ms"),
        {"bits": (2, 3, 4, 6, 8), "activation_bits": (8,), "trials": 10, "search_samples": 64,
         "distortion": "linearized", "latency_table": "epyc-genoa-ort"},
    ),
}  # fmt: skip


def main() -> None:
    """Run what has no rows yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", choices=SEARCHES)
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    known = {row["task"] for row in ROWS}
    for name in [arguments.task] if arguments.task else SEARCHES:
        if name not in known:
            rows = study(name, arguments.data, arguments.out)
            ROWS.append(*rows)


def study(name: str, data: Path | None, out: Path) -> list[dict[str, Any]]:
    """One row per budget of a task."""
    limits, settings = SEARCHES[name]
    task = load_task(name, data=data)
    folder = out / name
    if "latency" in str(limits) and "latency_table" not in settings:
        settings = {**settings, "latency_table": str(measured_table(task, out))}
    if not is_finished(folder):
        search.run(
            name, budget=limits, out=folder, resume=(folder / "config.json").exists(),
            data=None if data is None else str(data), seed=SEED, threads=1, **settings,
        )  # fmt: skip
    front = search.load(folder)
    point = front.best_point()
    packed = ParetoFront.load(folder / "front.json").packed[point.trial]
    measured = measure(folder / packed, settings)
    common = {"task": name, "trial": point.trial, "loss": point.loss, "seed": SEED}
    common |= {"date": str(date.today()), "load": round(os.getloadavg()[0], 1)}
    return [
        common | verdict(key, limit, predicted, measured[key])
        for key, limit, predicted in predictions(limits, point)
    ]


def is_finished(folder: Path) -> bool:
    """Whether a run's front is packed."""
    path = folder / "front.json"
    return path.exists() and bool(ParetoFront.load(path).packed)


def measured_table(task: Task, out: Path) -> Path:
    """A latency table of the task's own kernels, unpruned; an interrupted one goes on."""
    path = out / f"{task.name}-kernels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    profile(OnnxRuntime(), task, path, plan=Plan(rounds=12), pruned=False)
    return path


def predictions(limits: tuple[str, ...], point: Evaluation) -> list[tuple[str, float, float]]:
    """(cost, limit, predicted) of every budget."""
    budgets = Budgets.parse(limits)
    return [(name, float(limit), point.costs[name]) for name, limit in budgets.limits.items()]


def measure(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Every cost that can be measured from a packed file, whose graph has names of its own."""
    model = PackedModel.load(path).model
    out: dict[str, float] = {"size_bytes": path.stat().st_size}
    if "fpga" in settings:
        pipeline, _ = pipelined(unroll(lower(model), model.graph).logic)
        cells = synthesize(pipeline, settings["fpga"], timeout_s=YOSYS_S)
        return out | {"lut": cells.lut, "ff": cells.ff}
    out["ram_bytes"] = lay_out(generate(PackedModel.load(path)).network).n_bytes
    table = load_table(find_table(settings["latency_table"]))
    (check,) = check_candidates(
        model.graph, {0: model.candidate}, Latency(table), OnnxRuntime()
    ).values()
    return out | {"latency_ms": check.measured_ms}


def verdict(key: str, limit: float, predicted: float, measured: float) -> dict[str, Any]:
    """Whether the measurement is inside the limit, strictly and within the model's stated error."""
    return {
        "cost": key, "limit": limit, "predicted": predicted, "measured": measured,
        "met": measured <= limit, "within_error": measured <= limit * (1 + STATED[key]()),
    }  # fmt: skip


def _fitted(key: str) -> Callable[[], float]:
    return lambda: family(FAMILY).facts["held_out"][key]["mean_error_percent"] / 100


STATED: dict[str, Callable[[], float]] = {
    "size_bytes": lambda: 0.0,
    "ram_bytes": lambda: 0.0,
    "lut": _fitted("lut"),
    "ff": _fitted("ff"),
    "latency_ms": lambda: 0.053,  # median of 20 networks like ResNet-20, README.md
}


def print_table() -> None:
    """Rows as Markdown."""
    print("| task | cost | limit | predicted | measured | off by | met |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        off = 100 * (row["predicted"] / row["measured"] - 1)
        met = "yes" if row["met"] else "within the error" if row["within_error"] else "no"
        numbers = " | ".join(f"{row[key]:,.6g}" for key in ("limit", "predicted", "measured"))
        print(f"| {row['task']} | {row['cost']} | {numbers} | {off:+.1f} % | {met} |")


if __name__ == "__main__":
    main()
