"""Ray actors that hold the model and the data; a lost worker loses no candidate."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch

from quant_ops.errors import EnvironmentFault
from search.evaluation import Evaluation
from search.evaluator import Evaluator
from search.prefix import beginning
from search.runners.base import Job, Runner
from search.runners.in_process import measure_jobs
from search.tasks.table import FILE_MODULE

log = logging.getLogger("bitfront.runners")

CALL_SECONDS = 10.0  # of a call at most: every call starts anew what its jobs have in common
MAX_JOBS_PER_CALL = 32
MAX_LOSSES = 3  # a job that takes this many workers down with it is at fault itself
START_SECONDS = 300.0


class _Worker:
    """One process with one evaluator."""

    def __init__(self, make_evaluator: Callable[[], Evaluator], threads: int) -> None:
        import search

        if search.PROJECT != "bitfront":
            raise RuntimeError("another distribution shadows the package 'search' on this worker")
        torch.set_num_threads(threads)
        self._evaluator = make_evaluator()

    def ready(self) -> bool:
        self._evaluator.judge("search")
        return True

    def measure(self, jobs: Sequence[Job]) -> list[Evaluation | float]:
        return measure_jobs(self._evaluator, jobs)


class Cluster(Runner):
    """Long-lived Ray actors, one evaluator each.

    Args:
        make_evaluator: builds the evaluator inside the worker; pickled by value.
        n_workers: number of actors.
        address: of a running cluster to join; None starts a local one.
        threads: torch threads of each worker.
        timeout_s: a call that takes longer counts as hung; its worker is replaced.
    """

    def __init__(
        self,
        make_evaluator: Callable[[], Evaluator],
        *,
        n_workers: int,
        address: str | None = None,
        threads: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        self.n_workers = n_workers
        self._threads = threads
        self._timeout_s = timeout_s
        self._started_here = not ray.is_initialized()
        if self._started_here:
            start(address, n_workers)
        _pickle_task_files_by_value()
        self._factory = ray.put(make_evaluator)
        self._actor_class = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        self._workers = [self._new_worker() for _ in range(n_workers)]
        self._wait_until_ready(self._workers)
        self._seconds_per_job = CALL_SECONDS  # the first calls hold one job

    def _new_worker(self) -> Any:
        return self._actor_class.remote(self._factory, self._threads)

    def _wait_until_ready(self, workers: Sequence[Any]) -> None:
        try:
            ray.get([worker.ready.remote() for worker in workers], timeout=START_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EnvironmentFault(
                f"{len(workers)} Ray workers could not be started ({lines[-1].strip()}); there "
                f"may be too little memory or too few CPUs for --workers {self.n_workers}: use "
                f"fewer, or --workers 0"
            ) from error

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Evaluation | float]]:
        waiting = deque(_likeness_order(jobs))
        again: deque[list[int]] = deque()
        losses = [0] * len(jobs)
        running: dict[Any, tuple[int, list[int], float]] = {}
        idle = deque(range(self.n_workers))
        try:
            while waiting or again or running:
                while (waiting or again) and idle:
                    slot = idle.popleft()
                    chunk = again.popleft() if again else self._next_chunk(waiting)
                    call = self._workers[slot].measure.remote([jobs[i] for i in chunk])
                    running[call] = (slot, chunk, time.monotonic())
                done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for call in done or self._hung(running):
                    slot, chunk, since = running.pop(call)
                    try:
                        results = ray.get(call, timeout=0 if call not in done else None)
                    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                        again.extendleft([i] for i in self._replace(slot, chunk, losses, error))
                    else:
                        self._seconds_per_job = max(1e-3, (time.monotonic() - since) / len(chunk))
                        yield from zip(chunk, results, strict=True)
                    idle.append(slot)
        finally:
            for call in running:
                ray.cancel(call, force=False)

    def _next_chunk(self, waiting: deque[int]) -> list[int]:
        """Neighbours, which share work: an equal part, as far as it is done in time."""
        share = -(-len(waiting) // self.n_workers)
        in_time = int(CALL_SECONDS / self._seconds_per_job)
        size = max(1, min(share, in_time, MAX_JOBS_PER_CALL))
        return [waiting.popleft() for _ in range(size)]

    def _hung(self, running: dict[Any, tuple[int, list[int], float]]) -> list[Any]:
        now = time.monotonic()
        return [call for call, (_, _, since) in running.items() if now - since > self._timeout_s]

    def _replace(
        self, slot: int, chunk: list[int], losses: list[int], error: Exception
    ) -> list[int]:
        """Put a new worker into the slot; return the jobs to run again, last first."""
        log.warning(
            "worker %d was lost (%s); replaced, its jobs run again", slot, type(error).__name__
        )
        ray.kill(self._workers[slot])
        self._workers[slot] = self._new_worker()
        self._wait_until_ready([self._workers[slot]])  # its start must not count as hanging
        for i in chunk:
            losses[i] += 1
            if losses[i] >= MAX_LOSSES:
                raise EnvironmentFault(
                    f"{MAX_LOSSES} workers in a row died or hung on the same candidates; "
                    f"there may be too little memory for --workers {self.n_workers}: use fewer"
                )
        return chunk[::-1]

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._started_here:
            ray.shutdown()


def _pickle_task_files_by_value() -> None:
    """A worker cannot import the module of a task file: it lies under no name on its path."""
    for name, module in list(sys.modules.items()):
        if name.startswith(FILE_MODULE):
            ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]


def start(address: str | None, n_workers: int) -> None:
    """Join the cluster at `address`, or start one on this machine.

    Raises:
        EnvironmentFault: it cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=n_workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "on this machine"
        raise EnvironmentFault(
            f"Ray cannot be reached {where}: {error}; use --workers 0 to run in this process"
        ) from error


def _likeness_order(jobs: Sequence[Job]) -> list[int]:
    """Positions of jobs, those whose networks begin alike side by side."""
    layers = list(dict.fromkeys(name for job in jobs for name, _ in job.candidate.layers))
    keys = [(job.kind, beginning(job.candidate, layers)) for job in jobs]
    return sorted(range(len(jobs)), key=keys.__getitem__)
