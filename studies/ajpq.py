"""What the agents add: cold, warm, joint against two-step, one training for many budgets.

    python studies/ajpq.py --data DATA [--task cifar10-resnet20] [--part cold|warm|budgets]
    python studies/ajpq.py --table [--task cifar10-resnet20] [--images 512] [--evaluations 200]

Every cell (part, method, seed) is one run and one row of studies/rows/ajpq.jsonl; cells that have
a row are skipped, a killed run is resumed. Cold: the method alone. Warm: on a copy of one record,
of uniform widths, rate-distortion and channel allocation; the gain is over that record. Budgets:
one run that is asked for five sizes, against five runs of a fifth of the evaluations each, all of
them on copies of that record. The own share is that of the search's time which is not spent on
measuring candidates or channels.
"""

import argparse
import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from row_file import RowFile

from quant_ops.candidate import Candidate
from search.budget import Budgets, parse_size
from search.config import RunConfig
from search.context import Limits, RunContext
from search.dominance import HypervolumeScale, non_dominated
from search.evaluation import Evaluation
from search.prepare import Prepared, prepare
from search.record import JOURNAL, Record
from search.runners.base import Runner
from search.runners.cluster import Cluster
from search.runners.in_process import InProcess
from search.strategies.table import make_strategy
from search.strategy import ChannelFacts, SearchOver
from search.tasks.table import load_task

SEEDS = (0, 1, 2, 3, 4)
METHODS = ("ajpq", "haq", "two-step", "nsga2", "local-search", "random")
ABLATIONS = {
    "ajpq, nothing learned": ("ajpq", {"steps": "0"}),
    "ajpq, layers alike at first": ("ajpq", {"tilt": "0"}),
}
COMMON = ("uniform", "rate-distortion", "channel-allocation")  # the record of the warm runs
EVALUATIONS = 200  # of the method; those of the common record come on top
COMMON_EVALUATIONS = 60  # at most, of each common strategy
IMAGES, PROBE_IMAGES = 512, 128
BUDGETS = {
    "cifar10-resnet20": ("50kB", "70kB", "90kB", "110kB", "140kB"),
    "cifar10-resnet56": ("150kB", "200kB", "270kB", "350kB", "430kB"),
    "digits": ("1MB", "1.5MB", "2MB", "3MB", "4MB"),
}
PREPARED: dict[str, Prepared] = {}
ROWS = RowFile("ajpq")


def main() -> None:
    """Measure the missing cells, or print the tables of what is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20", choices=BUDGETS)
    parser.add_argument("--part", choices=("cold", "warm", "budgets"))
    parser.add_argument("--method", choices=(*METHODS, *ABLATIONS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ajpq"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        names = ("task", "evaluations", "images", "workers")
        same = {name: getattr(arguments, name) for name in names}
        print_tables([r for r in ROWS if all(r.get(k, 0) == v for k, v in same.items())])
        return
    for seed in SEEDS[: arguments.seeds]:
        for part in (arguments.part,) if arguments.part else ("cold", "warm", "budgets"):
            methods = ("one run", "five runs") if part == "budgets" else METHODS
            for method in methods if part == "budgets" else chosen(arguments.method):
                measure_cell(arguments, part, method, seed)


def chosen(method: str | None) -> tuple[str, ...]:
    """The method asked for, or all."""
    return METHODS if method is None else (method,)


def measure_cell(arguments: argparse.Namespace, part: str, method: str, seed: int) -> None:
    """Run one cell unless its row is there."""
    keys = {
        "task": arguments.task, "part": part, "method": method, "seed": seed,
        "evaluations": arguments.evaluations, "images": arguments.images,
        "workers": arguments.workers,
    }  # fmt: skip
    if any(all(row.get(k, 0) == v for k, v in keys.items()) for row in ROWS):
        return
    folder = arguments.out / "-".join(str(v) for v in keys.values()).replace(" ", "-")
    started = time.monotonic()
    budgets = BUDGETS[arguments.task]
    if part == "budgets":
        asked = [budgets] if method == "one run" else [(budget,) for budget in budgets]
        strategy, settings = "ajpq", {}
    else:
        asked = [budgets[-1:]]
        strategy, settings = ABLATIONS.get(method, (method, {}))
    n = arguments.evaluations // len(asked)
    common: list[Evaluation] = []
    found: list[Evaluation] = []
    searching = measuring = 0.0
    for i, sizes in enumerate(asked):
        prepared = prepared_task(arguments, sizes, seed)
        if part != "cold":
            copy_of_common(arguments, folder / str(i))
        context, seconds = run(prepared, folder / str(i), {strategy: n}, settings)
        searching, measuring = searching + seconds, measuring + context.measuring
        for evaluation in context.history():
            (common if evaluation.strategy in COMMON else found).append(evaluation)
    n_found = len(found)
    # the first of two steps may lie over the budget
    found = [e for e in found if e.size_bytes <= parse_size(budgets[-1])]
    scale = scale_of(prepared)
    row = keys | {
        "hypervolume": scale.hypervolume(common + found),
        "common": scale.hypervolume(common),  # cold agents measure uniform widths too
        "losses": [best_at(common + found, parse_size(budget)) for budget in budgets],
        "front": [(e.size_bytes, e.loss) for e in non_dominated(common + found)],
        "scale": [scale.smallest_bytes, scale.largest_bytes, scale.worst_loss],
        "trials": n_found,
        "seconds": round(time.monotonic() - started, 1),
        "own_share": round(1 - measuring / max(searching, 1e-9), 3),
    }
    ROWS.append(row)
    print({k: v for k, v in row.items() if k not in ("front", "scale")}, flush=True)


def copy_of_common(arguments: argparse.Namespace, folder: Path) -> None:
    """The record of the common strategies, made once, in the place of a run's own."""
    if folder.exists():
        return
    common = arguments.out / f"common-{arguments.task}-{arguments.images}"
    finished = common / "finished"
    if not finished.exists():
        prepared = prepared_task(arguments, BUDGETS[arguments.task], seed=0)
        run(prepared, common, dict.fromkeys(COMMON, COMMON_EVALUATIONS))
        finished.touch()
    partial = folder.with_name(folder.name + "-partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(common, partial)
    partial.rename(folder)


def prepared_task(arguments: argparse.Namespace, budgets: tuple[str, ...], seed: int) -> Prepared:
    """The task with widths per channel; it is the same for all budgets and seeds."""
    config = RunConfig(
        task=arguments.task,
        granularity="channel",
        search_samples=arguments.images,
        probe_samples=PROBE_IMAGES,
        workers=arguments.workers,
        threads=arguments.threads,
    )
    if config.task not in PREPARED:
        task = load_task(arguments.task, data=arguments.data)
        PREPARED[config.task] = prepare(task, config)
    prepared = PREPARED[config.task]
    return replace(prepared, config=replace(config, budgets=budgets, seed=seed))


class TimedContext(RunContext):
    """Sums up the seconds that the last strategy waits for measurements."""

    measuring = 0.0

    def begin(self, strategy: str, limits: Limits, *, in_full: bool = False) -> None:
        """See `RunContext.begin`."""
        self.measuring = 0.0
        super().begin(strategy, limits, in_full=in_full)

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """See `RunContext.evaluate`."""
        started = time.monotonic()
        try:
            return super().evaluate(candidates)
        finally:
            self.measuring += time.monotonic() - started

    def channel_facts(self) -> Mapping[str, ChannelFacts]:
        """See `RunContext.channel_facts`."""
        started = time.monotonic()
        facts = super().channel_facts()
        self.measuring += time.monotonic() - started
        return facts


def run(
    prepared: Prepared,
    folder: Path,
    shares: Mapping[str, int],
    settings: Mapping[str, str] | None = None,
) -> tuple[TimedContext, float]:
    """One strategy after the other on one record, without packing and checking a front.

    Gives the context, and the seconds that the last strategy took.

    Args:
        prepared: the task.
        folder: of the record; a record that is there is taken up.
        shares: strategy to its evaluations at most.
        settings: of those strategies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, asked = prepared.config, Budgets.parse(prepared.config.budgets)
    if (folder / JOURNAL).exists():
        record = Record.open(folder)
    else:
        record = Record.create(folder, name=prepared.task.name, metadata=prepared.digests)
    runner: Runner = InProcess(prepared.evaluator)
    if config.workers:
        runner = Cluster(prepared.spec, n_workers=config.workers, threads=max(1, config.threads))
    context = TimedContext(
        space=prepared.space,
        budgets=asked.limits,
        sizes=asked.sizes,
        early_stop=True,
        costs=prepared.costs,
        seed=config.seed,
        runner=runner,
        record=record,
        folder=folder,
        evaluator=prepared.evaluator,
    )
    try:
        for name in COMMON:
            known = [e.candidate for e in record.evaluations() if e.strategy == name]
            context.begin(name, Limits(len(known), None))
            context.evaluate(known)  # answered from the record
        for name, share in shares.items():
            started = time.monotonic()
            context.begin(name, Limits(share, None))
            with contextlib.suppress(SearchOver):
                make_strategy(name, settings).run(context)
    finally:
        runner.close()
    return context, time.monotonic() - started


def scale_of(prepared: Prepared) -> HypervolumeScale:
    """That of the task, as every front.json has it."""
    cost, graph = prepared.costs["size_bytes"].cost, prepared.traced.graph
    low, high = (int(cost(graph, c)) for c in (prepared.space.smallest(), prepared.space.largest()))
    return HypervolumeScale(low, high, prepared.worst_loss())


def best_at(evaluations: list[Evaluation], size_bytes: int) -> float | None:
    """Lowest loss at or under a size."""
    losses = [e.loss for e in evaluations if e.size_bytes <= size_bytes]
    return min(losses, default=None)


def print_tables(rows: list[dict]) -> None:
    """Hypervolumes cold, gains warm, and ajpq's paired difference to every other method."""
    for part in ("cold", "warm", "budgets"):
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        print(f"\n{part}: hypervolume" + (" gained over the common record" * (part != "cold")))
        print("| method | per seed | ajpq minus this, 95 % bootstrap | minutes | own share |")
        print("|---|---|---|---|---|")
        first = "one run" if part == "budgets" else "ajpq"
        ours = values(mine, first)
        for method in dict.fromkeys(row["method"] for row in mine):
            theirs = values(mine, method)
            minutes = [row["seconds"] / 60 for row in mine if row["method"] == method]
            shares = [row["own_share"] for row in mine if row["method"] == method]
            print(
                f"| {method} | {' '.join(f'{v:.4f}' for v in theirs.values())}",
                "-" if method == first else paired(ours, theirs),
                f"{np.mean(minutes):.1f}",
                f"{np.mean(shares):.0%} |",
                sep=" | ",
            )


def values(rows: list[dict], method: str) -> dict[int, float]:
    """Seed to hypervolume, less that of the common record where there is one."""
    return {
        row["seed"]: row["hypervolume"] - (row["common"] if row["part"] != "cold" else 0.0)
        for row in rows
        if row["method"] == method
    }


def paired(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean difference over common seeds and its interval."""
    differences = np.array([ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())])
    if not len(differences):
        return "-"
    rng = np.random.default_rng(0)
    means = differences[rng.integers(len(differences), size=(10_000, len(differences)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{differences.mean():+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()
