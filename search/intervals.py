"""95 % confidence intervals of what is measured on a finite split."""

import math

from search.evaluation import Evaluation

Z95 = 1.959963984540054


def wilson(share: float, n_samples: int) -> tuple[float, float]:
    """Interval of a proportion seen in `n_samples` independent samples [Wilson1927].

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n); (0, 1) where there are no samples.

    >>> low, high = wilson(0.5, 100)
    >>> f"{low:.4f} {high:.4f}"
    '0.4038 0.5962'
    """
    if n_samples < 1:
        return 0.0, 1.0
    z2 = Z95 * Z95 / n_samples
    middle = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def normal(mean: float, stderr: float) -> tuple[float, float]:
    """mean ± 1.96 standard errors."""
    return mean - Z95 * stderr, mean + Z95 * stderr


def loss_interval(evaluation: Evaluation) -> tuple[float, float]:
    """Of the quality loss over validation samples."""
    return normal(evaluation.loss, evaluation.loss_stderr)


def metric_interval(
    value: float | None, *, percent: bool, n_samples: int, stderr: float | None = None
) -> tuple[float, float] | None:
    """Of the metric: Wilson's for a proportion, normal where a standard error is known.

    A `percent` metric is a share of samples. None where neither is the case.
    """
    if value is None or n_samples < 1:
        return None
    if percent and 0 <= value <= 1:
        return wilson(value, n_samples)
    return None if stderr is None else normal(value, stderr)
