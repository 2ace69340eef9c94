"""The default on small machines: one candidate after the other, all threads on each."""

import time
from collections.abc import Iterator, Sequence

from search.evaluation import Evaluation
from search.evaluator import Evaluator
from search.runners.base import Job, Runner

CHUNK_SECONDS = 5.0  # results are recorded, and a limit is heeded, about this often
MAX_CHUNK = 32


class InProcess(Runner):
    """Evaluates in the calling process."""

    n_workers = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._seconds_per_job = CHUNK_SECONDS  # the first chunk holds one job

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Evaluation | float]]:
        position = 0
        while position < len(jobs):
            size = max(1, min(MAX_CHUNK, int(CHUNK_SECONDS / self._seconds_per_job)))
            chunk = jobs[position : position + size]
            started = time.perf_counter()
            results = measure_jobs(self._evaluator, chunk)
            self._seconds_per_job = max(1e-3, (time.perf_counter() - started) / len(chunk))
            yield from enumerate(results, start=position)
            position += len(chunk)


def measure_jobs(evaluator: Evaluator, jobs: Sequence[Job]) -> list[Evaluation | float]:
    """Results in order; jobs of one kind share what their networks have in common."""
    results: dict[int, Evaluation | float] = {}
    probes = [i for i, job in enumerate(jobs) if job.kind == "probe"]
    rest = [i for i, job in enumerate(jobs) if job.kind != "probe"]
    if probes:
        measured = evaluator.measure_many([jobs[i].candidate for i in probes], "probe")
        results.update({i: m.loss for i, m in zip(probes, measured, strict=True)})
    if rest:
        incumbents = [jobs[i].incumbent for i in rest]
        evaluated = evaluator.evaluate_many([jobs[i].candidate for i in rest], incumbents)
        results.update(zip(rest, evaluated, strict=True))
    return [results[i] for i in range(len(jobs))]
