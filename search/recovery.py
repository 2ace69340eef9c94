"""Better weights for a candidate from calibration inputs alone: its widths and size stay."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from quant_ops.blocks import split_into_blocks
from quant_ops.candidate import Candidate
from quant_ops.correction import reestimate_norms
from quant_ops.distill import DistillationSettings, distill, kl_loss, squared_loss
from quant_ops.errors import UsageError
from quant_ops.moments import InputMoments, collect_moments
from quant_ops.quantized import QuantizedModel
from quant_ops.reconstruct import Learned, ReconstructionSettings, reconstruct
from quant_ops.rounding import round_layers
from quant_ops.samples import Samples
from quant_ops.sensitivity import channel_sensitivity, gaussian_gradient, sampled_label_gradient
from search.evaluation import Evaluation
from search.prepare import Prepared
from search.quality import is_kl

LEVELS = ("none", "fast", "full")
RECOVERY = "recovery"  # fact beside a recovered trial: its steps
Plan: TypeAlias = list[tuple[str, Callable[[QuantizedModel], QuantizedModel]]]
RESAMPLES = 1000
# a loss of this share of the worst is learned with few steps; so many decades above, with most
HARMLESS, DECADES = 1e-3, 1.5
STEPS_APART = 100
_LEARNING_BATCH = 32


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """`--set recovery.KEY=VALUE`.

    Attributes:
        steps: of learning per block, for a network that rounding hardly harmed.
        most_steps: for one that it harmed badly; between the two as the loss is.
        window: blocks that are learned together, see `ReconstructionSettings`.
        epochs: of the last distillation.
        swaps: how often widths are moved between layers after recovery, at each size asked for.
        points: of the front, at most; 0 takes 12 (48 at level "fast"). Sizes asked for come first.
    """

    steps: int = 200
    most_steps: int = 400
    window: int = 1
    epochs: float = 2.0
    swaps: int = 1
    points: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.most_steps:
            raise ValueError(
                f"wanted 1 <= steps <= most_steps, got {self.steps}, {self.most_steps}"
            )
        if self.window < 1 or min(self.epochs, self.swaps, self.points) < 0:
            raise ValueError("window must be at least 1; epochs, swaps and points at least 0")


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a recovery did.

    Attributes:
        name: of the step.
        loss: quality loss on the search split after it; of the first step, before anything.
        change: mean change of the loss, sample by sample, against the model before it.
        interval: 95 % bootstrap interval of that change.
        kept: a step is dropped when all of its interval is above 0.
        seconds: wall time without the measurement.
    """

    name: str
    loss: float
    change: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    kept: bool = True
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        low, high = value["interval"]
        return cls(**{**value, "interval": (low, high)})


@dataclass(frozen=True)
class Recovered:
    """A recovered model and how it came about."""

    model: QuantizedModel
    steps: tuple[Step, ...]
    recipe: str

    @property
    def loss(self) -> float:
        """Quality loss on the search split of the model."""
        return next(step.loss for step in reversed(self.steps) if step.kept)


class Recovery:
    """Recovers models of one network; what does not depend on widths is computed once.

    Args:
        prepared: the task.
        seed: of all randomness.
        settings: how much is learned.
    """

    def __init__(
        self, prepared: Prepared, *, seed: int = 0, settings: RecoverySettings | None = None
    ) -> None:
        self.settings = settings or RecoverySettings()
        self.prepared = prepared
        self._seed = seed
        self._known_blocks: dict[bytes, Learned] = {}
        traced = prepared.traced
        self._graph, self._params = traced.graph, traced.params
        self._batches = prepared.spec.splits["calibration"].batches
        self._learning_batch = None if traced.static_batch else _LEARNING_BATCH
        self._is_kl = is_kl(prepared.task)

    def recover(
        self,
        candidate: Candidate,
        level: str = "fast",
        *,
        budget_s: float | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> Recovered:
        """Run the steps of a level one after the other, each kept unless it clearly harms.

        Args:
            candidate: the widths.
            level: "fast" (second-order rounding, norms) or "full" (also block-wise
                reconstruction and distillation).
            budget_s: seconds after which no further step is begun.
            on_step: told of every finished step.

        Raises:
            UsageError: there is no such level.
        """
        if level not in LEVELS:
            raise UsageError(f"recovery must be one of {', '.join(LEVELS)}, got {level!r}")
        started = time.perf_counter()
        model = self.prepared.evaluator.bank.quantize(candidate)
        losses = self._losses(model)
        done = [Step("start", float(losses.mean()))]
        on_step(done[-1])
        self._wanted: Mapping[str, Tensor] = {}
        for name, run in self._plan(level):
            if budget_s is not None and time.perf_counter() - started > budget_s:
                break
            begun = time.perf_counter()
            changed = run(model)
            seconds = time.perf_counter() - begun
            new_losses = self._losses(changed)
            step = judged(name, losses, new_losses, seconds=seconds, seed=self._seed)
            if step.kept:
                model, losses = changed, new_losses
            done.append(step)
            on_step(step)
        return Recovered(model, tuple(done), level)

    def _plan(self, level: str) -> Plan:
        fast: Plan = [("rounding", self._rounded), ("norms", self._renormed)]
        if level == "none":
            return []
        if level == "fast":
            return fast
        learned: Plan = [("reconstruction", self._reconstructed), ("norms", self._renormed)]
        return [*fast, *learned, ("distillation", self._distilled)]

    def _rounded(self, model: QuantizedModel) -> QuantizedModel:
        calibration = self.prepared.spec.calibration
        model, self._wanted = round_layers(model, self._params, self._moments, calibration)
        return model

    def _renormed(self, model: QuantizedModel) -> QuantizedModel:
        return reestimate_norms(model, self.prepared.spec.calibration, self._batches)

    def _reconstructed(self, model: QuantizedModel) -> QuantizedModel:
        settings = ReconstructionSettings(
            steps=self._steps(float(self._losses(model).mean())),
            window=self.settings.window,
            batch=self._learning_batch,
            seed=self._seed,
        )
        return reconstruct(
            model,
            self._params,
            self._batches,
            self._wanted,
            output_loss=kl_loss if self._is_kl else squared_loss,
            sensitivity=self._sensitivity,
            settings=settings,
            known=self._known_blocks,
        )

    def _distilled(self, model: QuantizedModel) -> QuantizedModel:
        return distill(
            model,
            self._params,
            self._batches,
            output_loss=kl_loss if self._is_kl else squared_loss,
            settings=DistillationSettings(
                epochs=self.settings.epochs, batch=self._learning_batch, seed=self._seed
            ),
        )

    def _steps(self, loss: float) -> int:
        """More where more is broken, linear in the logarithm of the loss."""
        settings, worst = self.settings, self.prepared.worst_loss()
        share = float(np.clip(np.log10(max(loss, 1e-12) / worst / HARMLESS) / DECADES, 0, 1))
        steps = settings.steps + share * (settings.most_steps - settings.steps)
        # few different numbers, so that models that begin alike can share their first blocks
        return min(
            settings.most_steps, max(settings.steps, STEPS_APART * round(steps / STEPS_APART))
        )

    @cached_property
    def _moments(self) -> dict[str, InputMoments]:
        known = self.prepared.spec.moments
        return dict(known) or collect_moments(self._graph, self._params, self._batches)

    @cached_property
    def _sensitivity(self) -> dict[int, Tensor]:
        nodes = [block.targets[0] for block in split_into_blocks(self._graph)[:-1]]
        return channel_sensitivity(
            self._graph,
            self._params,
            Samples(self._batches, self._learning_batch),
            nodes,
            sampled_label_gradient if self._is_kl else gaussian_gradient,
            seed=self._seed,
        )

    def _losses(self, model: QuantizedModel) -> Tensor:
        return self.prepared.evaluator.losses_of(model)


def recover(
    prepared: Prepared,
    evaluation: Evaluation,
    level: str = "fast",
    *,
    seed: int = 0,
    settings: RecoverySettings | None = None,
    budget_s: float | None = None,
) -> Recovered:
    """Recover one evaluated candidate; see `Recovery` for several of one task."""
    recovery = Recovery(prepared, seed=seed, settings=settings)
    return recovery.recover(evaluation.candidate, level, budget_s=budget_s)


def judged(name: str, before: Tensor, after: Tensor, *, seconds: float, seed: int) -> Step:
    """Compare losses sample by sample; the step is kept unless it is clearly worse.

    Clearly: the 95 % bootstrap interval of the mean change lies above 0, or an output is no
    longer finite.

    Args:
        name: of the step.
        before: (samples,) quality losses without it.
        after: the same with it.
        seconds: what the step took.
        seed: of the resampling.
    """
    change = (after - before).numpy()
    if not np.isfinite(change).all():
        worse = not bool(torch.isfinite(after).all())
        return Step(name, float(after.mean()), kept=not worse, seconds=seconds)
    generator = np.random.default_rng([seed, RESAMPLES])
    picked = generator.integers(len(change), size=(RESAMPLES, len(change)))
    low, high = np.percentile(change[picked].mean(axis=1), [2.5, 97.5])
    return Step(
        name,
        float(after.mean()),
        float(change.mean()),
        (float(low), float(high)),
        bool(low <= 0),
        seconds,
    )
