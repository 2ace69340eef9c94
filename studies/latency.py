"""Predicted against measured latency of whole networks: one MLP, one CNN, 20 candidates each.

    python studies/latency.py --out rows/latency.jsonl [--network mlp|cnn|all]

Each network's kernels are profiled, then 20 candidates of 400 random ones, spread evenly from the
fastest to the slowest by prediction, are built and timed in turn: float, weights alone at 2, 4 and
8 bits, integers throughout or in the first half, with 0 to 75 % of each layer's channels removed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cost_models.latency.measure import Plan
from cost_models.latency.model import Latency
from cost_models.latency.onnxruntime_backend import OnnxRuntime
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.graph import Graph
from search.capture import trace
from search.profiling import LatencySummary, check_candidates, profile
from search.task import Task
from search.tasks.models import CifarResNet
from search.tasks.training import seeded

N_RANDOM, N_CHOSEN = 400, 20


def mlp() -> Task:
    """784 -> 1024 -> 1024 -> 512 -> 10, random weights: latency does not depend on them."""
    sizes = (784, 1024, 1024, 512, 10)

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return _task("latency-mlp", seeded(make, 0), (784,))


def wide() -> Task:
    """1024 -> 4096 -> 4096 -> 1024: layers whose weights are read from memory at every run."""
    hidden = [nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    model = seeded(lambda: nn.Sequential(*hidden, nn.Linear(4096, 1024)), 0)
    return _task("latency-wide", model, (1024,))


def cnn() -> Task:
    """ResNet-20 for 32x32 images, random weights."""
    return _task("latency-resnet20", seeded(lambda: CifarResNet(20), 0), (3, 32, 32))


def _task(name: str, model: nn.Module, shape: tuple[int, ...]) -> Task:
    inputs = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    batches = [((inputs,), torch.zeros(8, dtype=torch.int64))]
    return Task(name, model.eval(), calibration=batches, validation=batches)


NETWORKS = {"mlp": mlp, "cnn": cnn}


def random_candidates(graph: Graph, n: int, seed: int) -> Iterator[Candidate]:
    """Kinds of precision crossed with pruning, drawn evenly."""
    rng = np.random.default_rng(seed)
    names = [layer.name for layer in graph.searchable_layers]
    edges = [e.name for e in activation_edges(graph) if e.kind not in ("output", "partial")]
    yield Candidate.of({})
    for _ in range(n - 1):
        share = float(rng.choice([1.0, 0.75, 0.5, rng.uniform(0.25, 1.0)]))
        kind = rng.choice(["uniform", "mixed", "integer", "half"])
        bits = rng.choice([2, 4, 8], len(names) if kind == "mixed" else 1)
        widths = np.broadcast_to(bits if kind in ("uniform", "mixed") else 8, len(names))
        layers = {
            name: _kept(graph.layer_of[name].out_channels, share, float(width))
            if name != names[-1]
            else LayerQuant((float(width),))
            for name, width in zip(names, widths, strict=True)
        }
        active = {"integer": edges, "half": edges[: len(edges) // 2]}.get(str(kind), [])
        yield Candidate.of(layers, dict.fromkeys(active, 8))


def _kept(n_channels: int, share: float, width: float) -> LayerQuant:
    kept = max(1, round(share * n_channels))
    return LayerQuant((width,) * kept + (0.0,) * (n_channels - kept))


def stratified(graph: Graph, model: Latency, candidates: list[Candidate]) -> list[Candidate]:
    """One from each of equal steps in predicted time, from the fastest to the slowest."""
    costs = np.array([model.cost(graph, c) for c in candidates])
    wanted = np.geomspace(costs.min(), costs.max(), N_CHOSEN)
    chosen: list[int] = []
    for time in wanted:
        order = np.argsort(np.abs(np.log(costs / time)), kind="stable")
        chosen.append(next(int(i) for i in order if int(i) not in chosen))
    return [candidates[i] for i in chosen]


def study(name: str, *, rounds: int, seed: int) -> list[dict[str, object]]:
    """Rows of one network: the candidates, then the summary."""
    task, backend = NETWORKS[name](), OnnxRuntime()
    graph = trace(task.model, task.examples()).graph
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{name}.json"
        table = profile(backend, task, out, plan=Plan(rounds=rounds))
    model = Latency(table)
    candidates = stratified(graph, model, list(random_candidates(graph, N_RANDOM, seed)))
    before = os.getloadavg()[0]
    checks = check_candidates(graph, dict(enumerate(candidates)), model, backend)
    rows: list[dict[str, object]] = [
        {"network": name, "n": i, **asdict(check), "ratio": check.ratio}
        for i, check in checks.items()
    ]
    summary = LatencySummary.of(list(checks.values()))
    measured = [check.measured_ms for check in checks.values()]
    rows.append(
        {
            "network": name,
            "summary": asdict(summary),
            "measured_spread": max(measured) / min(measured),
            "load_average": [round(before, 1), round(os.getloadavg()[0], 1)],
            "entries": len(table.entries),
            "libraries": dict(table.libraries),
            "seed": seed,
        }
    )
    print(name, summary.line(), f"slowest / fastest {rows[-1]['measured_spread']:.1f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "rows/latency.jsonl")
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(NETWORKS) if arguments.network == "all" else [arguments.network]
    for name in chosen:
        rows = study(name, rounds=arguments.rounds, seed=arguments.seed)
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
