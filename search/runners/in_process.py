"""The default on small machines: one candidate after the other, all threads on each."""

from collections.abc import Iterator, Sequence

from search.evaluation import Evaluation
from search.evaluator import Evaluator
from search.runners.base import Job, Runner


class InProcess(Runner):
    """Evaluates in the calling process."""

    n_workers = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Evaluation | float]]:
        for position, job in enumerate(jobs):
            if job.kind == "probe":
                yield position, self._evaluator.measure(job.candidate, "probe").loss
            else:
                yield position, self._evaluator.evaluate(job.candidate)
