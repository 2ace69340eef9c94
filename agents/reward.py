"""What an episode is worth: how much better than rate-distortion at the bytes it may take."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from quant_ops.candidate import Candidate
from search.evaluation import Evaluation

REFERENCES = ("rate-distortion", "uniform")
FLOOR = 1e-9  # of a loss, before its logarithm
WORST = 1e4  # stands for a loss that is not finite


class Baseline:
    """The reference curve, log loss over log bytes, from what the record holds.

    The best of rate-distortion and uniform widths at or under every size, straight lines between
    points, level beyond the ends. Without two points the curve is the median of the record.

    Args:
        evaluations: of the record.
        uniform: candidates of one width each, whoever proposed them.
    """

    def __init__(
        self, evaluations: Sequence[Evaluation], uniform: Collection[Candidate] = ()
    ) -> None:
        plain = [e for e in evaluations if math.isfinite(e.loss) and not e.pruned and not e.recipe]
        front: list[Evaluation] = []
        known = [e for e in plain if e.strategy in REFERENCES or e.candidate in uniform]
        for evaluation in sorted(known, key=lambda e: (e.size_bytes, e.loss)):
            if not front or evaluation.loss < front[-1].loss:
                front.append(evaluation)
        if len(front) < 2:
            middle = float(np.median([log_loss(e.loss) for e in plain])) if plain else 0.0
            self._sizes, self._losses = np.array([0.0, 1.0]), np.array([middle, middle])
            return
        self._sizes = np.log([e.size_bytes for e in front])
        self._losses = np.array([log_loss(e.loss) for e in front])

    def log_loss(self, size_bytes: float) -> float:
        """Natural logarithm of the reference's loss at a size."""
        return float(np.interp(math.log(max(size_bytes, 1.0)), self._sizes, self._losses))

    def reward(self, loss: float, size_bytes: float) -> float:
        """sign(x) ln(1 + |x|) of x = ln(reference's loss / loss) at `size_bytes`.

        The second logarithm keeps broken networks apart without letting them drown the rest.
        Terminal, and the same whatever the number of steps: transitions carry it as their
        return, undiscounted.
        """
        missed = log_loss(loss if math.isfinite(loss) else WORST) - self.log_loss(size_bytes)
        return -math.copysign(math.log1p(abs(missed)), missed)


def log_loss(loss: float) -> float:
    """Natural logarithm, for losses down to 0."""
    return math.log(max(loss, FLOOR))
