"""How near evaluations come to the bare forward pass, as ratios within one run.

    python studies/throughput.py --data DATA [--task cifar10-resnet20] [--images 1024]

Bare: the float network, norms folded, in inference mode, at the best of several batch sizes and
memory formats. Evaluations: whole candidates of a rate-distortion front, weights known. Prefix:
a refinement of one point, all its neighbours by one step. Rounds are interleaved; the figure is
the ratio of the medians. Two Ray workers are compared with two plain processes that do the same
evaluations, one thread each.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import cloudpickle
import torch
from row_file import RowFile

from quant_ops.candidate import Candidate
from quant_ops.executor import Executor
from search.config import RunConfig
from search.prepare import Prepared, prepare
from search.runners.base import Job
from search.tasks.table import load_task

ROWS = RowFile("throughput")
BATCHES = (64, 128, 256, 512)
ROUNDS = 5


def main() -> None:
    """Measure, print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-ray", action="store_true")
    arguments = parser.parse_args()
    prepared = prepared_task(arguments)
    row = {"task": arguments.task, "date": str(date.today()), "threads": arguments.threads}
    row |= in_process(prepared, arguments.images)
    if not arguments.without_ray:
        row |= on_two_workers(prepared, arguments)
    ROWS.append(row)
    for key, value in row.items():
        print(f"{key:32} {value}")


def prepared_task(arguments: argparse.Namespace) -> Prepared:
    """The task with as many judged images as asked for."""
    config = RunConfig(
        task=arguments.task,
        data=str(arguments.data),
        search_samples=arguments.images,
        threads=arguments.threads,
    )
    return prepare(load_task(arguments.task, data=arguments.data), config)


def in_process(prepared: Prepared, images: int) -> dict[str, float]:
    """Images per second: bare, whole candidates, candidates that begin alike."""
    evaluator = prepared.evaluator
    whole, near = candidates_of(prepared)
    for candidate in (*whole, *near):
        evaluator.bank.params(candidate)
    evaluator.judge("search")
    bare = bare_passes(prepared, images)
    work: dict[str, tuple[Callable[[], object], int]] = {
        **{name: (run, images) for name, run in bare.items()},
        "whole": (lambda: [evaluator.measure(c) for c in whole], images * len(whole)),
        "prefix": (lambda: evaluator.evaluate_many(near), images * len(near)),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, (run, count) in work.items():
            started = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - started))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(bare, key=lambda name: medians[name])
    return {
        "bare": best,
        "bare_images_per_second": round(medians[best], 1),
        "whole_of_bare": round(medians["whole"] / medians[best], 3),
        "prefix_of_bare": round(medians["prefix"] / medians[best], 3),
    }


def bare_passes(prepared: Prepared, images: int) -> dict[str, Callable[[], object]]:
    """The float network alone over `images` images, per batch size and memory format."""
    traced = prepared.traced
    executor = Executor(traced.graph)
    data = torch.cat([inputs[0] for inputs in prepared.spec.splits["search"].inputs()])[:images]
    out: dict[str, Callable[[], object]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        params = {
            name: value.to(memory_format=layout) if value.dim() == 4 else value
            for name, value in traced.params.items()
        }
        inputs = data.to(memory_format=layout) if data.dim() == 4 else data
        for size in BATCHES:
            parts = inputs.split(size)
            name = f"{str(layout).removeprefix('torch.')}, {size}"
            out[name] = lambda p=params, x=parts: [executor(p, (part,)) for part in x]
    return out


def candidates_of(prepared: Prepared) -> tuple[list[Candidate], list[Candidate]]:
    """Some uniform and mixed candidates; every one-step neighbour of a mixed one."""
    space = prepared.space
    widths = [choice.bit_widths for choice in space.layers]
    base = [min(len(w) - 2, 4 if i % 3 else 5) for i, w in enumerate(widths)]
    mixed = space.decode(base)
    near = []
    for gene, at in enumerate(base):
        for step in (-1, 1):
            changed = [*base[:gene], at + step, *base[gene + 1 :]]
            near.append(space.decode(changed))
    return [mixed, space.uniform(4), space.uniform(6), space.uniform(8)], near


def on_two_workers(prepared: Prepared, arguments: argparse.Namespace) -> dict[str, float]:
    """Evaluations per second of two Ray workers over those of two plain processes."""
    from search.runners.cluster import Cluster

    _, near = candidates_of(prepared)
    context = multiprocessing.get_context("spawn")
    cluster = Cluster(prepared.spec, n_workers=2, threads=1)
    pipes, processes = [], []
    spec = cloudpickle.dumps(prepared.spec)  # it holds local functions
    for part in (near[::2], near[1::2]):
        here, there = context.Pipe()
        process = context.Process(target=_plain_worker, args=(there, spec, part))
        process.start()
        pipes.append(here)
        processes.append(process)
    try:
        for pipe in pipes:
            pipe.recv()  # ready, weights quantized
        list(cluster.run([Job(c) for c in near]))
        ray_seconds, plain_seconds = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            list(cluster.run([Job(c) for c in near]))
            ray_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            for pipe in pipes:
                pipe.send("go")
            for pipe in pipes:
                pipe.recv()
            plain_seconds.append(time.perf_counter() - started)
    finally:
        for pipe in pipes:
            pipe.send("stop")
        for process in processes:
            process.join()
        cluster.close()
    ratio = statistics.median(plain_seconds) / statistics.median(ray_seconds)
    return {"two_workers_of_two_processes": round(ratio, 3)}


def _plain_worker(pipe, spec: bytes, candidates: list[Candidate]) -> None:
    torch.set_num_threads(1)
    evaluator = cloudpickle.loads(spec)()
    evaluator.evaluate_many(candidates)
    pipe.send("ready")
    while pipe.recv() == "go":
        evaluator.evaluate_many(candidates)
        pipe.send("done")


if __name__ == "__main__":
    main()
