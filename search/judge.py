"""Compares a network's outputs on one split with the float model's and with the labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from search.data import Split
from search.early_stop import Stop
from search.quality import QualityLoss, agreement
from search.task import Metric


@dataclass(frozen=True, slots=True)
class Measurement:
    """Quality of one network on one split.

    `metric` and `agreement` are None where the split has no labels, or the outputs no classes.
    """

    loss: float
    loss_stderr: float
    metric: float | None
    agreement: float | None


@dataclass(slots=True)
class Tally:
    """What was seen of one network so far, a tensor per batch; where it was given up, if it was."""

    losses: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    stop: Stop | None = None


class Judge:
    """Compares outputs on one split with those of the float model and with the labels.

    Args:
        split: inputs and labels.
        float_outputs: of the float model, one tree per batch.
        quality_loss: (outputs, reference) -> (batch,).
        by_target: the reference is the label, not the float model's output.
        metric: the task's.
    """

    def __init__(
        self,
        split: Split,
        float_outputs: Sequence[Any],
        *,
        quality_loss: QualityLoss,
        by_target: bool,
        metric: Metric,
    ) -> None:
        self.split = split
        self.float_outputs = float_outputs
        self._quality_loss = quality_loss
        self._by_target = by_target
        self._metric = metric

    def measure(self, run: Callable[[tuple[Tensor, ...]], Any]) -> Measurement:
        """Run every batch through `run` (inputs -> outputs tree) and judge."""
        tally = Tally()
        for number, (inputs, _) in enumerate(self.split.batches):
            self.add(tally, number, run(inputs))
        return self.conclude(tally)

    def losses(self, run: Callable[[tuple[Tensor, ...]], Any]) -> Tensor:
        """(samples,) quality losses, for comparisons sample by sample."""
        tally = Tally()
        for number, (inputs, _) in enumerate(self.split.batches):
            self.add(tally, number, run(inputs))
        return torch.cat(tally.losses)

    def add(self, tally: "Tally", number: int, outputs: Any) -> None:
        """Judge the outputs of batch `number`; batches come in order."""
        _, target = self.split.batches[number]
        reference = self.float_outputs[number]
        losses = self._quality_loss(outputs, target if self._by_target else reference)
        tally.losses.append(losses)
        if target is not None and self._metric.per_sample:
            tally.scores.append(self._scores(outputs, target, len(losses)))
        elif target is not None:
            tally.outputs.append(outputs)
        if are_logits(reference):
            tally.same.append(agreement(outputs, reference))

    def conclude(self, tally: "Tally") -> Measurement:
        """The measurement of all batches."""
        loss = torch.cat(tally.losses)
        mean = float(loss.mean())
        spread = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
        return Measurement(
            loss=mean if math.isfinite(mean) else math.inf,
            loss_stderr=spread if math.isfinite(spread) else math.inf,
            metric=self._score(tally.scores, tally.outputs),
            agreement=float(torch.cat(tally.same).mean()) if tally.same else None,
        )

    def _scores(self, outputs: Any, target: Any, n_samples: int) -> Tensor:
        values = torch.as_tensor(self._metric.function(outputs, target))
        if values.shape != (n_samples,):
            raise UsageError(
                f"the metric {self._metric.name!r} must give one value per sample, a tensor of "
                f"shape ({n_samples},), but gave one of shape {tuple(values.shape)}; or say "
                f"Metric(per_sample=False)"
            )
        return values.double()

    def _score(self, scores: Sequence[Tensor], outputs: Sequence[Any]) -> float | None:
        if scores:
            return float(torch.cat(list(scores)).mean())
        if not outputs:
            return None
        targets = [target for _, target in self.split.batches]
        joined = pytree.tree_map(lambda *leaves: torch.cat(leaves), *outputs)
        whole = torch.cat(targets) if isinstance(targets[0], Tensor) else targets
        return float(self._metric.function(joined, whole))


def are_logits(outputs: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and outputs.is_floating_point()
        and outputs.dim() >= 2
        and outputs.shape[1] > 1
    )
