"""Measures candidates: quality loss, metric, agreement, every cost."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cost_models.base import CostModel
from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Params
from quant_ops.quantized import ActivationQuant, QuantizedModel
from search.capture import Traced
from search.data import Split
from search.evaluation import Evaluation
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
        losses: list[Tensor] = []
        scores: list[Tensor] = []
        same: list[Tensor] = []
        outputs_seen: list[Any] = []
        for (inputs, target), reference in zip(self.split.batches, self.float_outputs, strict=True):
            outputs = run(inputs)
            losses.append(self._quality_loss(outputs, target if self._by_target else reference))
            if target is not None and self._metric.per_sample:
                scores.append(torch.as_tensor(self._metric.function(outputs, target)).double())
            elif target is not None:
                outputs_seen.append(outputs)
            if _are_logits(reference):
                same.append(agreement(outputs, reference))
        loss = torch.cat(losses)
        mean = float(loss.mean())
        spread = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
        return Measurement(
            loss=mean if math.isfinite(mean) else math.inf,
            loss_stderr=spread if math.isfinite(spread) else math.inf,
            metric=self._score(scores, outputs_seen),
            agreement=float(torch.cat(same).mean()) if same else None,
        )

    def losses(self, run: Callable[[tuple[Tensor, ...]], Any]) -> Tensor:
        """(samples,) quality losses, for comparisons sample by sample."""
        found = [
            self._quality_loss(run(inputs), target if self._by_target else reference)
            for (inputs, target), reference in zip(
                self.split.batches, self.float_outputs, strict=True
            )
        ]
        return torch.cat(found)

    def _score(self, scores: Sequence[Tensor], outputs: Sequence[Any]) -> float | None:
        if scores:
            return float(torch.cat(list(scores)).mean())
        if not outputs:
            return None
        targets = [target for _, target in self.split.batches]
        joined = pytree.tree_map(lambda *leaves: torch.cat(leaves), *outputs)
        whole = torch.cat(targets) if isinstance(targets[0], Tensor) else targets
        return float(self._metric.function(joined, whole))


def _are_logits(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() >= 2 and outputs.is_floating_point()


class Evaluator:
    """Holds the float network and its data, and evaluates candidates one at a time.

    Args:
        traced: the float network.
        bank: turns a candidate into parameters.
        splits: name to split; "search" judges candidates, "probe" single layers, "validation"
            the finished front.
        costs: cost-model name to model.
    """

    def __init__(
        self,
        traced: Traced,
        bank: WeightBank,
        splits: Mapping[str, Split],
        *,
        quality_loss: QualityLoss,
        by_target: bool,
        metric: Metric,
        costs: Mapping[str, CostModel],
    ) -> None:
        self.traced = traced
        self.bank = bank
        self.costs = costs
        self._executor = Executor(traced.graph)
        self._splits = splits
        self._quality_loss = quality_loss
        self._by_target = by_target
        self._metric = metric
        self._judges: dict[str, Judge] = {}

    def judge(self, split: str) -> Judge:
        """The judge of a split; its float outputs are computed at the first call."""
        if split not in self._judges:
            self._judges[split] = self.new_judge(self._splits[split])
        return self._judges[split]

    def new_judge(self, data: Split) -> Judge:
        """A judge of other data than the evaluator's own splits."""
        outputs = [self._run(self.traced.params, {}, inputs) for inputs in data.inputs()]
        return Judge(
            data,
            outputs,
            quality_loss=self._quality_loss,
            by_target=self._by_target,
            metric=self._metric,
        )

    def measure_float(self, judge: Judge) -> Measurement:
        """The float network: loss 0 up to rounding, and its metric."""
        return judge.measure(lambda x: self._run(self.traced.params, {}, x))

    def measure(self, candidate: Candidate, split: str = "search") -> Measurement:
        """Quality of a candidate; a layer or edge that it does not name stays float."""
        params = self.bank.params(candidate)
        transforms = self.transforms(candidate)
        return self.judge(split).measure(lambda x: self._run(params, transforms, x))

    def measure_model(self, model: QuantizedModel, split: str = "search") -> Measurement:
        """Quality of a model that brings weights of its own."""
        transforms = self._transforms(model.activations)
        params = model.params()
        return self.judge(split).measure(lambda x: self._run(params, transforms, x))

    def losses_of(self, model: QuantizedModel, split: str = "search") -> Tensor:
        """(samples,) quality losses of a model that brings weights of its own."""
        transforms = self._transforms(model.activations)
        params = model.params()
        return self.judge(split).losses(lambda x: self._run(params, transforms, x))

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Quality on the search split and every cost."""
        started = time.perf_counter()
        measured = self.measure(candidate)
        return Evaluation(
            candidate=candidate,
            loss=measured.loss,
            loss_stderr=measured.loss_stderr,
            metric=measured.metric,
            agreement=measured.agreement,
            costs={n: m.cost(self.traced.graph, candidate) for n, m in self.costs.items()},
            seconds=time.perf_counter() - started,
        )

    def transforms(self, candidate: Candidate) -> dict[int, Transform]:
        """Node index to fake quantizer, for every quantized edge of the candidate."""
        return self._transforms(self.bank.activations(candidate))

    def _transforms(self, quantizers: Mapping[str, ActivationQuant]) -> dict[int, Transform]:
        return {
            edge.node: quantizers[edge.name].fake_quantize
            for edge in activation_edges(self.traced.graph)
            if edge.name in quantizers
        }

    def _run(
        self, params: Params, transforms: Mapping[int, Transform], inputs: tuple[Tensor, ...]
    ) -> Any:
        outputs, _ = self._executor.run(params, inputs, transforms=transforms)
        return pytree.tree_unflatten(list(outputs), self.traced.out_spec)
