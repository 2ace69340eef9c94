"""One finished trial: a candidate and everything measured of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate

SAMPLES, SAMPLES_LEFT = "samples", "samples left"  # notes of a stopped evaluation
ESTIMATE = "estimated loss"
CALIBRATED = ("", "none", "fast", "full")  # recipes that see no training data
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
        pruned: the evaluation was stopped early, because it was certain that an earlier trial of
            at most its size is better. `loss` is a lower confidence bound then, above that
            trial's loss; metric and agreement are None, and notes say how many samples were seen.
        sample_losses: (samples,) that `loss` is the mean of, fresh from the evaluator only; never
            recorded.
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
    sample_losses: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def is_trained(self) -> bool:
        """Whether the weights were learned from training data, not from calibration alone."""
        return self.recipe.removesuffix(CODED).removesuffix(" + ") not in CALIBRATED

    @property
    def size_bytes(self) -> int:
        """Length of the packed file."""
        return int(self.costs["size_bytes"])

    @property
    def estimated_loss(self) -> float:
        """The loss; of a stopped evaluation what it was heading for, not the bound."""
        return self.notes.get(ESTIMATE, self.loss)

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


def excess(budgets: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """Cost name to how far it is above its limit, in units of the limit; not above 0 where it fits.

    >>> excess({"lut": 10, "dsp": 0}, {"lut": 15, "dsp": 3})
    {'lut': 0.5, 'dsp': 3.0}
    """
    return {name: (costs[name] - limit) / (limit or 1.0) for name, limit in budgets.items()}


def share_saved(evaluations: Iterable[Evaluation]) -> float:
    """The share of forward passes that early stopping saved, of all that plain trials ask for."""
    plain = [e for e in evaluations if not e.recipe]
    stopped = [e.notes for e in plain if SAMPLES_LEFT in e.notes]
    if not stopped:
        return 0.0
    n_samples = stopped[0][SAMPLES] + stopped[0][SAMPLES_LEFT]
    return float(sum(notes[SAMPLES_LEFT] for notes in stopped) / (n_samples * len(plain)))
