"""An Evaluation as one finished Optuna trial and back, under 2 kB at layer granularity.

Names of layers and edges are stored once per study (a `Layout`); a trial holds widths only.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from quant_ops.candidate import Candidate, LayerQuant
from search.evaluation import Evaluation, excess, within

MAX_PARAMS = 6  # a parameter takes 120 bytes of the trial's 2 kB
_COST, _NOTE = "cost ", "note "
_OLD_CONSTRAINTS = "constraints"  # the key that optuna-dashboard reads


@dataclass(frozen=True)
class Layout:
    """Names of the layers and edges that a candidate decides on, in order."""

    layers: tuple[str, ...]
    activations: tuple[str, ...]

    @classmethod
    def of(cls, candidate: Candidate) -> "Layout":
        """That of `candidate`."""
        return cls(
            tuple(name for name, _ in candidate.layers),
            tuple(name for name, _ in candidate.activations),
        )

    @cached_property
    def key(self) -> str:
        """Eight hexadecimal digits."""
        text = json.dumps([self.layers, self.activations])
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    @cached_property
    def blocks(self) -> tuple[tuple[str, int, int], ...]:
        """Runs of consecutive layers (label, first, last + 1): the dashboard's parameters."""
        n = len(self.layers)
        if n <= MAX_PARAMS:
            return tuple((f"bits {name}", i, i + 1) for i, name in enumerate(self.layers))
        cuts = [round(i * n / MAX_PARAMS) for i in range(MAX_PARAMS + 1)]
        digits = len(str(n))
        return tuple((f"bits {a + 1:0{digits}d}-{b:0{digits}d}", a, b) for a, b in pairwise(cuts))

    def params(self, candidate: Candidate) -> dict[str, float]:
        """Mean bit width of each block of layers."""
        means = [sum(q.bit_widths) / len(q.bit_widths) for _, q in candidate.layers]
        return {label: round(sum(means[a:b]) / (b - a), 3) for label, a, b in self.blocks}


def widths_to_text(candidate: Candidate) -> str:
    """Widths without names, runs of equal layers merged.

    >>> widths_to_text(Candidate.of({"a": 8, "b": 4, "c": 4}, {"x": 8, "y": 8}))
    '8 4*2 | 8*2'
    """
    weights = _runs([quant.to_text() for _, quant in candidate.layers])
    if not candidate.activations:
        return weights
    return f"{weights} | {_runs([str(width) for _, width in candidate.activations])}"


def widths_from_text(text: str, layout: Layout) -> Candidate:
    """Inverse of `widths_to_text`."""
    weights, _, edges = text.partition("|")
    quants = [LayerQuant.from_text(item) for item in _unrolled(weights)]
    return Candidate(
        tuple(zip(layout.layers, quants, strict=True)),
        tuple(zip(layout.activations, map(int, _unrolled(edges)), strict=True)),
    )


def to_trial(evaluation: Evaluation, layout: Layout, budgets: Mapping[str, float]) -> FrozenTrial:
    """A whole finished trial; a pruned one carries its bound."""
    known = {name: limit for name, limit in budgets.items() if name in evaluation.costs}
    constraints = excess(known, evaluation.costs)
    params = layout.params(evaluation.candidate)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(0.0, 8.0) for name in params
    }
    loss = math.inf if math.isnan(evaluation.loss) else float(evaluation.loss)
    trial = create_trial(
        state=TrialState.PRUNED if evaluation.pruned else TrialState.COMPLETE,
        values=[loss, float(evaluation.size_bytes)],
        params=params,
        distributions=distributions,
        user_attrs=_attributes(evaluation, layout, budgets),
        system_attrs={_OLD_CONSTRAINTS: list(constraints.values())} if constraints else None,
        constraints=constraints,
    )
    assert trial.datetime_complete is not None
    trial.datetime_start = trial.datetime_complete - timedelta(seconds=evaluation.seconds)
    return trial


def from_trial(trial: FrozenTrial, layout: Layout) -> Evaluation:
    """Inverse of `to_trial`."""
    attrs = trial.user_attrs
    parent = attrs.get("parent")
    return Evaluation(
        candidate=widths_from_text(attrs["widths"], layout),
        loss=trial.values[0],
        metric=attrs.get("metric"),
        costs=_section(attrs, _COST),
        loss_stderr=attrs.get("loss stderr", 0.0),
        agreement=attrs.get("agreement"),
        seconds=attrs.get("seconds", 0.0),
        strategy=attrs.get("strategy", ""),
        seed=attrs.get("seed", 0),
        recipe=attrs.get("recipe", ""),
        parent=parent,
        weights_digest=attrs.get("weights", ""),
        trial=trial.number,
        pruned=trial.state == TrialState.PRUNED,
        notes=_section(attrs, _NOTE),
    )


def layout_key(trial: FrozenTrial) -> str | None:
    """Which layout the trial's widths belong to; None where the trial is not one of ours."""
    key = trial.user_attrs.get("layout")
    return key if isinstance(key, str) and trial.state.is_finished() else None


def _attributes(
    evaluation: Evaluation, layout: Layout, budgets: Mapping[str, float]
) -> dict[str, Any]:
    known = {name: limit for name, limit in budgets.items() if name in evaluation.costs}
    optional = {
        "metric": None if evaluation.metric is None else float(evaluation.metric),
        "agreement": None if evaluation.agreement is None else float(evaluation.agreement),
        "recipe": evaluation.recipe or None,
        "parent": evaluation.parent,
        "weights": evaluation.weights_digest or None,
    }
    return {
        "strategy": evaluation.strategy,
        "feasible": within(known, evaluation.costs),
        **{name: value for name, value in optional.items() if value is not None},
        "loss stderr": float(evaluation.loss_stderr),
        "seconds": evaluation.seconds,
        "seed": evaluation.seed,
        **{_COST + name: float(value) for name, value in evaluation.costs.items()},
        **{_NOTE + name: float(value) for name, value in evaluation.notes.items()},
        "layout": layout.key,
        "widths": widths_to_text(evaluation.candidate),
    }


def _section(attrs: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in attrs.items() if k.startswith(prefix)}


def _runs(items: Sequence[str]) -> str:
    runs = [(item, len(list(run))) for item, run in groupby(items)]
    return " ".join(item if n == 1 else f"{item}*{n}" for item, n in runs)


def _unrolled(text: str) -> list[str]:
    items: list[str] = []
    for run in text.split():
        item, _, count = run.partition("*")
        items += [item] * int(count or 1)
    return items
