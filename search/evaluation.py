"""One finished trial: a candidate and everything measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quant_ops.candidate import Candidate

CODED = "entropy"  # the codec, and what the recipe of an entropy-coded trial ends with


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Never rewritten: recovery and training make new ones that name their parent.

    Attributes:
        candidate: the widths.
        loss: quality loss on validation, minimised (inf when the outputs are not finite).
        loss_stderr: its standard error over validation samples.
        metric: the task's metric on validation, in its own direction.
        agreement: share of validation samples whose top-1 equals the float model's, or None.
        costs: cost-model name to value; always holds "size_bytes".
        seconds: wall time of the evaluation.
        strategy: who proposed it.
        recipe: "" for plain quantization, else what was done to the weights or to their file.
        parent: trial it started from.
        weights_digest: of the stored codes, when they are not a function of the candidate alone.
        trial: number in the record; -1 before it is recorded.
        pruned: the evaluation was stopped early; `loss` is a lower bound then.
    """

    candidate: Candidate
    loss: float
    metric: float | None
    costs: Mapping[str, float]
    loss_stderr: float = 0.0
    agreement: float | None = None
    seconds: float = 0.0
    strategy: str = ""
    seed: int = 0
    recipe: str = ""
    parent: int | None = None
    weights_digest: str = ""
    trial: int = -1
    pruned: bool = False
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Length of the packed file."""
        return int(self.costs["size_bytes"])

    @property
    def coded(self) -> bool:
        """Whether the file is entropy-coded: same weights as the parent's, fewer bytes."""
        return self.recipe.split(" + ")[-1] == CODED

    def with_trial(self, trial: int) -> "Evaluation":
        """The same evaluation under its number in the record."""
        return replace(self, trial=trial)


def within(budgets: Mapping[str, float], costs: Mapping[str, float]) -> bool:
    """Whether every budgeted cost is at or under its limit."""
    return all(costs[name] <= limit for name, limit in budgets.items())
