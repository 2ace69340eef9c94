"""From minutes to a number of steps, once: by timing a few."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

from search.training.settings import TrainingSettings
from search.training.trainer import Trainer

TIMED_STEPS = 4
SPARE = 0.9  # of the time: measuring, packing and a machine that grows busier take the rest


def steps_within(
    seconds: float, make: Callable[[TrainingSettings], Trainer], settings: TrainingSettings
) -> int:
    """How many steps of both parts of a training fit; at least 1.

    The time of making the trainer, and of the trial steps themselves, is taken off.

    Args:
        seconds: for one point.
        make: a trainer of a network of its own, without checkpoint and log.
        settings: of the training.
    """
    started = time.monotonic()
    per_step = 0.0
    parts = {1.0: settings.folded_share, 0.0: 1 - settings.folded_share}
    if not settings.norms:
        parts = {1.0: 1.0}
    for folded, weight in parts.items():
        if weight:
            tried = replace(settings, steps=TIMED_STEPS, folded_share=folded)
            per_step += weight * seconds_per_step(make, tried)
    left = seconds * SPARE - (time.monotonic() - started)
    return max(1, int(left / per_step))


def seconds_per_step(
    make: Callable[[TrainingSettings], Trainer], settings: TrainingSettings
) -> float:
    """Median over a few steps of a trainer made for it."""
    times: list[float] = []
    trainer = make(settings)
    trainer.hooks = replace(trainer.hooks, on_progress=lambda *_: times.append(time.perf_counter()))
    trainer.run()
    gaps = [after - before for before, after in pairwise(times)]
    return median(gaps) if gaps else 1.0
