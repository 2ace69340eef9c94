"""How long one inference takes, beside the float network, in one run."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from search.exporters.base import Runner

ROUNDS, SECONDS = 30, 3.0


def times_beside_float(
    runner: Runner, float_runner: Runner, float_name: str, inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """Medians of interleaved runs of one sample with one thread: only the ratio is portable."""
    sample = [x[:1] for x in inputs]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mine, other = _interleaved((runner, float_runner), sample)
    finally:
        torch.set_num_threads(threads)
    return {
        "time_per_inference": f"{_format(mine)}, {float_name} {_format(other)} "
        f"({other / mine:.2g} times as fast; one sample, one thread)",
    }


def _interleaved(runners: tuple[Runner, Runner], sample: Sequence[Tensor]) -> tuple[float, float]:
    for runner in runners:
        runner(sample)
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for runner, times in zip(runners, taken, strict=True):
            started = time.perf_counter()
            runner(sample)
            times.append(time.perf_counter() - started)
        if time.perf_counter() > end:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])


def _format(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
