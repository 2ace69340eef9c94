"""How far the distortion table's predictions are from what was measured of whole candidates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from search.config import read_config
from search.context import EDGE_PREFIX, PROBES
from search.evaluation import Evaluation
from search.record import Record

PREDICTED = "rate-distortion"  # whose candidates are the table's own choice
FEWEST = 3

Widths: TypeAlias = Mapping[str, float]  # layer, or edge: and its name, to bit width


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted against measured losses of some candidates.

    Attributes:
        median_ratio: of predicted to measured; below 1 layers hurt more together than alone.
        rank_correlation: Spearman's.
    """

    median_ratio: float
    rank_correlation: float

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> "Prediction":
        """Of equally many losses above 0."""
        ratio = float(np.median(np.array(predicted) / np.array(measured)))
        return cls(ratio, rank_correlation(np.array(predicted), np.array(measured)))


@dataclass(frozen=True, slots=True)
class PredictionReport:
    """What a run says of its table.

    Attributes:
        n_candidates: evaluations compared.
        additive: sums of single losses.
        n_pairs: probes of two layers.
        with_pairs: sums with pair terms; None where no pair was probed.
    """

    n_candidates: int
    additive: Prediction
    n_pairs: int = 0
    with_pairs: Prediction | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        rows = [("single layers", self.additive)]
        if self.with_pairs is not None:
            rows.append((f"with {self.n_pairs} pair terms", self.with_pairs))
        return [
            f"predicted / measured loss of {self.n_candidates} rate-distortion candidates, {what}: "
            f"median {p.median_ratio:.2f}, rank correlation {p.rank_correlation:.3f}"
            for what, p in rows
        ]


class LossTable:
    """Single and pair losses of a probe log, as the integer program reads them.

    Args:
        probes: (change, loss) of every probe.
    """

    def __init__(self, probes: Sequence[tuple[Widths, float]]) -> None:
        self._singles: dict[str, dict[float, float]] = {}
        for change, loss in probes:
            if len(change) == 1:
                ((name, width),) = change.items()
                self._singles.setdefault(name, {})[width] = loss
        for losses in self._singles.values():  # as `measure_table` does
            for narrow, wide in pairwise(sorted(losses)):
                losses[wide] = min(losses[narrow], losses[wide])
        pairs = [(change, loss) for change, loss in probes if len(change) == 2]
        self._terms = [
            (change, loss - sum(self._single(n, w) for n, w in change.items()))
            for change, loss in pairs
            if np.isfinite(loss)
        ]

    @property
    def n_pairs(self) -> int:
        """Number of pair terms."""
        return len(self._terms)

    def additive(self, widths: Widths) -> float:
        """Sum of the single losses; what was never probed has no choice and loses nothing."""
        return sum(self._single(name, width) for name, width in widths.items())

    def with_pairs(self, widths: Widths) -> float:
        """The same with the terms of the pairs that are in it."""
        terms = (t for change, t in self._terms if change.items() <= widths.items())
        return max(0.0, self.additive(widths) + sum(terms))

    def _single(self, name: str, width: float) -> float:
        return self._singles.get(name, {}).get(width, 0.0)


def prediction_report(folder: Path) -> PredictionReport | None:
    """Of a run's folder; None where it has too few rate-distortion candidates.

    Raises:
        UsageError: the folder holds no run.
    """
    config, _ = read_config(folder)
    path = folder / PROBES
    if not path.exists():
        return None
    evaluations = Record.open(folder, storage=config.storage).evaluations()
    return compared(_read(path), evaluations)


def compared(
    probes: Sequence[tuple[Widths, float]], evaluations: Sequence[Evaluation]
) -> PredictionReport | None:
    """Predictions against the plain rate-distortion evaluations of one width per layer."""
    table = LossTable(probes)
    rows = [
        (widths, e.loss)
        for e in evaluations
        if e.strategy == PREDICTED and not e.recipe and not e.pruned and 0 < e.loss < np.inf
        and (widths := _widths(e.candidate)) is not None
        and 0 < table.additive(widths) < np.inf
    ]  # fmt: skip
    if len(rows) < FEWEST:
        return None
    measured = [loss for _, loss in rows]
    additive = Prediction.of([table.additive(widths) for widths, _ in rows], measured)
    if not table.n_pairs:
        return PredictionReport(len(rows), additive)
    paired = Prediction.of([table.with_pairs(widths) for widths, _ in rows], measured)
    return PredictionReport(len(rows), additive, table.n_pairs, paired)


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, of values without ties to speak of.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.5, 0.3]))
    0.5
    """
    first, second = (values.argsort(kind="stable").argsort() for values in (a, b))
    return round(float(np.corrcoef(first, second)[0, 1]), 12)


def _widths(candidate: Candidate) -> dict[str, float] | None:
    layers = {name: quant.uniform for name, quant in candidate.layers}
    edges = {EDGE_PREFIX + name: float(width) for name, width in candidate.activations}
    uniform = {name: width for name, width in layers.items() if width is not None}
    return {**uniform, **edges} if len(uniform) == len(layers) else None


def _read(path: Path) -> list[tuple[Widths, float]]:
    """Every whole line; a run that is still going may be writing the last one."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [(json.loads(key), loss) for key, loss in map(json.loads, whole.splitlines())]
