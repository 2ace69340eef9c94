"""The Pareto front of a run: non-dominated in (quality loss, size_bytes), inside every budget."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quant_ops.candidate import Candidate
from quant_ops.errors import NothingFeasibleError, VerificationError
from search.atomic import write_text
from search.budget import Budgets, format_size, parse_size
from search.dominance import REFERENCE_POINT, HypervolumeScale, non_dominated
from search.evaluation import Evaluation, share_saved, within

FORMAT, VERSION = "bitfront-front", 1
FRONT, TRAINED_FRONT = "front", "front, trained"
BASELINES = ("uniform", "rate-distortion")


@dataclass(frozen=True, slots=True)
class FrontInfo:
    """What a front is about: the same for every front of one run.

    Attributes:
        task, metric: names.
        higher_is_better, percent: as the task's Metric says; a percent metric is a share.
        n_validation: samples of the validation split.
        float_validation, float_test: metric of the float model; test is None until it is read.
        float_size_bytes: parameters of the float model.
        scale: constants of the hypervolume.
        budgets: what was asked.
        trained_apart: the float model was trained on validation inputs, so that trained points
            and those that saw calibration inputs alone cannot be ranked on them: two fronts.
    """

    task: str
    metric: str
    higher_is_better: bool
    percent: bool
    n_validation: int
    float_validation: float | None
    float_size_bytes: int
    scale: HypervolumeScale
    budgets: Budgets = field(default_factory=lambda: Budgets({}))
    float_test: float | None = None
    trained_apart: bool = False


@dataclass(frozen=True)
class ParetoFront:
    """Non-dominated evaluations inside every budget, sorted by size_bytes.

    Attributes:
        points: the front; losses fall strictly as sizes grow, of trained points and of the others
            each on its own where the info says `trained_apart`.
        baselines: uniform and rate-distortion evaluations, each strategy's own front.
        n_evaluations: complete and pruned ones behind it.
        n_stopped: the pruned ones: given up early.
        saved: share of the evaluations' forward passes that this saved.
        seconds: wall time of the search.
        mean_weight_bits, test, packed: by trial, of points and baselines; test metrics appear
            when they are read, packed files (relative paths) when they are written.
    """

    info: FrontInfo
    points: tuple[Evaluation, ...]
    baselines: tuple[Evaluation, ...] = ()
    n_evaluations: int = 0
    n_stopped: int = 0
    saved: float = 0.0
    seconds: float = 0.0
    mean_weight_bits: Mapping[int, float] = field(default_factory=dict)
    test: Mapping[int, float] = field(default_factory=dict)
    packed: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        evaluations: Sequence[Evaluation],
        info: FrontInfo,
        *,
        weights_per_channel: Mapping[str, tuple[int, int]] | None = None,
        seconds: float = 0.0,
    ) -> "ParetoFront":
        """The front of everything that was evaluated, in order of trial.

        Args:
            evaluations: pruned and non-finite ones are counted and left out.
            info: its budgets decide what is inside.
            weights_per_channel: as `SearchSpace.weights_per_channel`, for mean bit widths.
            seconds: wall time so far.
        """
        inside = [e for e in evaluations if within(info.budgets.limits, e.costs)]
        points = _points(inside, info.trained_apart)
        baselines = [
            e
            for strategy in BASELINES
            for e in _points([e for e in evaluations if e.strategy == strategy], info.trained_apart)
        ]
        mean_bits: dict[int, float] = {}
        for e in (*points, *baselines):
            if weights_per_channel is not None:
                mean_bits[e.trial] = e.candidate.mean_weight_bits(weights_per_channel)
            elif "mean_weight_bits" in e.notes:
                mean_bits[e.trial] = e.notes["mean_weight_bits"]
        front = cls(
            info,
            tuple(points),
            tuple(baselines),
            seconds=seconds,
            mean_weight_bits=mean_bits,
        )
        return front.counting(evaluations)

    @property
    def hypervolume(self) -> float:
        """In [0, 1], on the task's constants; of two fronts the larger."""
        return self.hypervolume_on(self.info.scale)

    def hypervolume_on(self, scale: HypervolumeScale) -> float:
        """The hypervolume on other constants."""
        return max((scale.hypervolume(part) for part in self.parts().values()), default=0.0)

    def parts(self) -> dict[str, list[Evaluation]]:
        """Names of fronts to points: trained ones apart where they must not be ranked together."""
        if not self.info.trained_apart:
            return {FRONT: list(self.points)} if self.points else {}
        parts = _kinds(self.points, True)
        return {TRAINED_FRONT if part[0].is_trained else FRONT: part for part in parts}

    def best(self, size: str | int | None = None) -> Evaluation:
        """The point of lowest loss at or under `size` ("2MB" or bytes); None: under the budgets.

        Where trained points are a front of their own, the larger of the two fronts' points is
        taken, the trained one at equal size: a point is trained from one of its own size.

        Raises:
            NothingFeasibleError: every point is larger, or there are none.
            BudgetError: not a size.
        """
        self._require_points()
        limit = parse_size(size) if isinstance(size, str) else size
        found = best_of(self.points, limit, trained_apart=self.info.trained_apart)
        if found is not None:
            return found
        assert limit is not None
        raise NothingFeasibleError(
            f"no model at or under {format_size(limit)}: the front reaches from "
            f"{self.reach()}; ask for more, or search on with a smaller --budget"
        )

    def within_drop(self, points: float) -> Evaluation:
        """The smallest model whose validation metric is at most `points` worse than float's.

        Args:
            points: percentage points for a percent metric, else in the metric's own unit.

        Raises:
            NothingFeasibleError: none is that good.
        """
        self._require_points()
        drops = [(self.drop(e), e) for e in self.points]
        known = [(drop, e) for drop, e in drops if drop is not None]
        for drop, e in known:
            if drop <= points + 1e-9:  # 0.9173 - 0.9123 is not 0.005 in floats
                return e
        best = f"the best loses {min(drop for drop, _ in known):.2f}" if known else "none is known"
        raise NothingFeasibleError(
            f"no model within {points:g} of the float {self.info.metric}: {best}; allow a larger "
            f"drop, a larger --budget, or search on"
        )

    def drop(self, evaluation: Evaluation) -> float | None:
        """How much worse than float on validation, in percentage points for a percent metric."""
        if self.info.float_validation is None or evaluation.metric is None:
            return None
        worse = self.info.float_validation - evaluation.metric
        worse = worse if self.info.higher_is_better else -worse
        return 100 * worse if self.info.percent else worse

    def reach(self) -> str:
        """Sizes of the smallest and the largest point, as printed."""
        return (
            f"{format_size(self.points[0].size_bytes)} to {format_size(self.points[-1].size_bytes)}"
        )

    def counting(self, evaluations: Sequence[Evaluation]) -> "ParetoFront":
        """With the numbers of these evaluations: those behind it."""
        return replace(
            self,
            n_evaluations=len(evaluations),
            n_stopped=sum(e.pruned for e in evaluations),
            saved=share_saved(evaluations),
        )

    def with_packed(self, packed: Mapping[int, str]) -> "ParetoFront":
        """With paths of packed files, relative to the run's folder, by trial."""
        return replace(self, packed={**self.packed, **packed})

    def with_test(
        self, test: Mapping[int, float], *, float_test: float | None = None
    ) -> "ParetoFront":
        """With test metrics, by trial."""
        info = self.info if float_test is None else replace(self.info, float_test=float_test)
        return replace(self, info=info, test={**self.test, **test})

    def to_json(self) -> dict[str, Any]:
        """The value of front.json."""
        info = self.info
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": info.task,
            "metric": info.metric,
            "higher_is_better": info.higher_is_better,
            "percent": info.percent,
            "n_validation": info.n_validation,
            "float": {
                "validation": info.float_validation,
                "test": info.float_test,
                "size_bytes": info.float_size_bytes,
            },
            "budgets": info.budgets.limits,
            "requested": {name: list(limits) for name, limits in info.budgets.requested.items()},
            "trained_apart": info.trained_apart,
            "hypervolume": {
                "value": self.hypervolume,
                "reference_point": list(REFERENCE_POINT),
                "scale": {
                    "size_bytes": [info.scale.smallest_bytes, info.scale.largest_bytes],
                    "loss": [0.0, info.scale.worst_loss],
                },
            },
            "n_evaluations": self.n_evaluations,
            "early_stop": {"stopped": self.n_stopped, "saved": self.saved},
            "seconds": self.seconds,
            "points": [self._point_to_json(e) for e in self.points],
            "baselines": [self._point_to_json(e) for e in self.baselines],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ParetoFront":
        """Inverse of `to_json`.

        Raises:
            VerificationError: not a front of this version, or not whole.
        """
        if not isinstance(value, Mapping):
            raise VerificationError(f"wanted a {FORMAT}, got a JSON {type(value).__name__}")
        if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise VerificationError(
                f"wanted a {FORMAT} of version {VERSION}, got format {value.get('format')!r} of "
                f"version {value.get('version')!r}"
            )
        try:
            rows = [*value["points"], *value["baselines"]]
            early = value.get("early_stop", {"stopped": 0, "saved": 0.0})
            return cls(
                _info_from_json(value),
                tuple(map(_point_from_json, value["points"])),
                tuple(map(_point_from_json, value["baselines"])),
                n_evaluations=value["n_evaluations"],
                n_stopped=early["stopped"],
                saved=early["saved"],
                seconds=value["seconds"],
                mean_weight_bits=_by_trial(rows, "mean_weight_bits"),
                test=_by_trial(rows, "test"),
                packed=_by_trial(rows, "packed"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationError(f"the front is not whole: {error!r} is missing") from error

    def save(self, path: Path) -> None:
        """Write front.json in one step."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ParetoFront":
        """Read front.json.

        Raises:
            VerificationError: not a front, or damaged.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise VerificationError(
                f"cannot read the front {path}: {error}; give the folder that `search run` wrote"
            ) from error

    def _require_points(self) -> None:
        if not self.points:
            limits = ", ".join(f"{n} <= {v:,.0f}" for n, v in self.info.budgets.limits.items())
            raise NothingFeasibleError(
                f"none of {self.n_evaluations} evaluations is inside the budgets "
                f"({limits or 'none given'}); raise --budget or search longer"
            )

    def _point_to_json(self, e: Evaluation) -> dict[str, Any]:
        return {
            "trial": e.trial,
            "strategy": e.strategy,
            "recipe": e.recipe,
            "loss": e.loss,
            "loss_stderr": _finite(e.loss_stderr) or 0.0,
            "validation": _finite(e.metric),
            "test": self.test.get(e.trial),
            "agreement": e.agreement,
            "size_bytes": e.size_bytes,
            "costs": dict(e.costs),
            "mean_weight_bits": self.mean_weight_bits.get(e.trial),
            "packed": self.packed.get(e.trial),
            "seconds": e.seconds,
            "seed": e.seed,
            "parent": e.parent,
            "weights_digest": e.weights_digest,
            "notes": dict(e.notes),
            "candidate": e.candidate.to_json(),
        }


def best_of(
    points: Sequence[Evaluation], limit: float | None, *, trained_apart: bool
) -> Evaluation | None:
    """The point of lowest loss at or under `limit` bytes; see `ParetoFront.best`."""
    fitting = [e for e in points if limit is None or e.size_bytes <= limit]
    best = [
        min(part, key=lambda e: (e.loss, e.size_bytes)) for part in _kinds(fitting, trained_apart)
    ]
    return max(best, key=lambda e: (e.size_bytes, e.is_trained), default=None)


def _points(evaluations: Sequence[Evaluation], trained_apart: bool) -> list[Evaluation]:
    parts = [non_dominated(part) for part in _kinds(evaluations, trained_apart)]
    return sorted((e for part in parts for e in part), key=lambda e: (e.size_bytes, e.is_trained))


def _kinds(evaluations: Sequence[Evaluation], trained_apart: bool) -> list[list[Evaluation]]:
    if not trained_apart:
        return [list(evaluations)] if evaluations else []
    parts = [[e for e in evaluations if e.is_trained is kind] for kind in (False, True)]
    return [part for part in parts if part]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _info_from_json(value: Mapping[str, Any]) -> FrontInfo:
    scale = value["hypervolume"]["scale"]
    smallest, largest = scale["size_bytes"]
    return FrontInfo(
        task=value["task"],
        metric=value["metric"],
        higher_is_better=value["higher_is_better"],
        percent=value["percent"],
        n_validation=value["n_validation"],
        float_validation=value["float"]["validation"],
        float_size_bytes=value["float"]["size_bytes"],
        scale=HypervolumeScale(smallest, largest, scale["loss"][1]),
        budgets=Budgets({name: tuple(limits) for name, limits in value["requested"].items()}),
        float_test=value["float"]["test"],
        trained_apart=value.get("trained_apart", False),
    )


def _point_from_json(value: Mapping[str, Any]) -> Evaluation:
    same = ("trial", "strategy", "recipe", "loss", "loss_stderr", "agreement", "costs", "seconds",
            "seed", "parent", "weights_digest", "notes")  # fmt: skip
    return Evaluation(
        candidate=Candidate.from_json(value["candidate"]),
        metric=value["validation"],
        **{name: value[name] for name in same},
    )


def _by_trial(rows: Iterable[Mapping[str, Any]], name: str) -> dict[int, Any]:
    return {row["trial"]: row[name] for row in rows if row[name] is not None}
