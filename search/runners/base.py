"""The contract of a runner."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from quant_ops.candidate import Candidate
from search.early_stop import Incumbent
from search.evaluation import Evaluation


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate to measure: in full, or (probe) its loss on the probe split alone.

    An evaluation is given up as soon as the incumbent, if there is one, is sure to be better.
    """

    candidate: Candidate
    kind: Literal["evaluate", "probe"] = "evaluate"
    incumbent: Incumbent | None = field(default=None, compare=False, repr=False)


class Runner(ABC):
    """Measures jobs and yields (position, result) as they finish, in any order."""

    n_workers: int

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Evaluation | float]]:
        """Every job exactly once; a caller may stop early and drop the iterator."""

    def close(self) -> None:  # noqa: B027 - most runners hold nothing
        """Give back whatever the runner holds."""
