"""Measures candidates: quality loss, metric, agreement, every cost."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cost_models.base import CostModel
from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.channel_losses import channel_losses
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Params
from quant_ops.layout import to_canonical
from quant_ops.perturbation import predicted_losses
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel
from quant_ops.sensitivity import gaussian_gradient, sampled_label_gradient
from quant_ops.weight_gradients import hessian_traces
from search.capture import Traced
from search.data import Split
from search.early_stop import Incumbent
from search.evaluation import ESTIMATE, SAMPLES, SAMPLES_LEFT, Evaluation
from search.judge import Judge, Measurement, Tally, are_logits
from search.prefix import Network, PrefixRunner, beginning
from search.quality import QualityLoss
from search.strategy import ChannelFacts, ChannelLosses
from search.task import Metric

PREDICTION_BATCH = 32  # gradients of every class are held for one batch


class Evaluator:
    """Holds the float network and its data, and evaluates candidates.

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
        self._prefixes = PrefixRunner(self._executor)
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
        transforms = _fake_quantizers(self._at_nodes(model.activations))
        params = model.params()
        return self.judge(split).measure(lambda x: self._run(params, transforms, x))

    def losses_of(self, model: QuantizedModel, split: str = "search") -> Tensor:
        """(samples,) quality losses of a model that brings weights of its own."""
        transforms = _fake_quantizers(self._at_nodes(model.activations))
        params = model.params()
        return self.judge(split).losses(lambda x: self._run(params, transforms, x))

    def measure_many(
        self, candidates: Sequence[Candidate], split: str = "search"
    ) -> list[Measurement]:
        """What `measure` gives for each, bit for bit; common beginnings are run once."""
        judge = self.judge(split)
        return [judge.conclude(tally) for tally in self._tallies(candidates, split)]

    def measure_variants(
        self,
        model: QuantizedModel,
        variants: Sequence[Mapping[str, QuantizedLayer]],
        split: str = "search",
    ) -> list[Measurement]:
        """Quality of a model with some layers replaced, for each of several replacements.

        Neighbours should differ from the same layer on: what two begin with is run once.
        """
        params = model.params()
        quantizers = self._at_nodes(model.activations)
        networks: list[Network] = []
        for variant in variants:
            changed = dict(params)
            for name, quantized in variant.items():
                layer = self.traced.graph.layer_of[name]
                changed[layer.weight] = quantized.weight(layer)
                bias = quantized.bias_values()
                if layer.bias is not None and bias is not None:
                    changed[layer.bias] = bias
            networks.append((changed, quantizers))
        judge = self.judge(split)
        return [judge.conclude(tally) for tally in self._run_networks(networks, split)]

    def predict_many(
        self, changes: Sequence[Candidate], measure: str, split: str = "probe"
    ) -> list[float]:
        """Quality loss of single changes predicted from gradients, see `predicted_losses`."""
        outputs = self.judge(split).float_outputs
        logits = bool(outputs) and are_logits(outputs[0])
        return predicted_losses(
            self.bank,
            self._small_batches(split).batches,
            changes,
            measure,
            sampled_label_gradient if logits else gaussian_gradient,
            logits=logits,
        )

    def channel_losses(
        self,
        widths: Mapping[str, Sequence[float]],
        split: str = "probe",
        bank: WeightBank | None = None,
    ) -> ChannelLosses:
        """Per layer the predicted losses of its channels, and the spread of their weights.

        Args:
            widths: layer name to the widths wanted.
            split: on which.
            bank: of another state of the network, if not the float one.
        """
        outputs, graph = self.judge(split).float_outputs, self.traced.graph
        logits = bool(outputs) and are_logits(outputs[0])
        losses = channel_losses(
            bank or self.bank,
            self._small_batches(split).batches,
            widths,
            sampled_label_gradient if logits else gaussian_gradient,
            logits=logits,
        )
        rows = {n: to_canonical(graph.layer_of[n], self._weight(n)).flatten(1) for n in widths}
        return {n: (losses[n], rows[n].double().std(dim=1).numpy()) for n in widths}

    def channel_facts(self, split: str = "probe") -> dict[str, ChannelFacts]:
        """Per searchable layer its channels' weights, norms, removal losses and curvature."""
        outputs, graph = self.judge(split).float_outputs, self.traced.graph
        logits = bool(outputs) and are_logits(outputs[0])
        gradient = sampled_label_gradient if logits else gaussian_gradient
        traces = hessian_traces(
            graph, self.bank.float_params, self._small_batches(split).batches, gradient
        )
        widths = {x.name: (0.0,) for x in graph.searchable_layers if x.kind != "embedding"}
        removed = self.channel_losses(widths, split)
        facts = {}
        for layer in graph.searchable_layers:
            rows = to_canonical(layer, self._weight(layer.name)).flatten(1).double().numpy()
            _, gamma = self.traced.norms.get(layer.name, (None, torch.ones(layer.out_channels)))
            trace = traces[layer.name]
            # what the rows of an embedding do at the outputs is known on the diagonal alone
            loss = (
                removed[layer.name][0][:, 0]
                if layer.name in removed
                else (0.5 * trace * (rows**2).mean(axis=1))
            )
            facts[layer.name] = ChannelFacts(rows, gamma.double().numpy(), loss, trace)
        return facts

    def _weight(self, layer: str) -> Tensor:
        return self.bank.float_params[self.traced.graph.layer_of[layer].weight]

    def _small_batches(self, split: str) -> Split:
        data = self._splits[split]
        return data if self.traced.static_batch is not None else data.cut(PREDICTION_BATCH)

    def _tallies(
        self,
        candidates: Sequence[Candidate],
        split: str,
        incumbents: Sequence[Incumbent | None] = (),
    ) -> list[Tally]:
        layers = [layer.name for layer in self.traced.graph.searchable_layers]
        order = sorted(range(len(candidates)), key=lambda i: beginning(candidates[i], layers))
        ordered = [candidates[i] for i in order]
        networks = [(self.bank.params(c), self._quantizers(c)) for c in ordered]
        rivals = [incumbents[i] for i in order] if incumbents else ()
        tallies = dict(zip(order, self._run_networks(networks, split, rivals), strict=True))
        return [tallies[i] for i in range(len(candidates))]

    def _run_networks(
        self,
        networks: Sequence[Network],
        split: str,
        incumbents: Sequence[Incumbent | None] = (),
    ) -> list[Tally]:
        """Every batch through every network; one that its incumbent is sure to beat leaves."""
        judge = self.judge(split)
        tallies = [Tally() for _ in networks]
        for number, (inputs, _) in enumerate(judge.split.batches):
            left = [i for i, tally in enumerate(tallies) if tally.stop is None]
            runs = self._prefixes.run([networks[i] for i in left], inputs)
            for i, outputs in zip(left, runs, strict=True):
                judge.add(tallies[i], number, self._tree(outputs))
                incumbent = incumbents[i] if incumbents else None
                if incumbent is not None:
                    tallies[i].stop = incumbent.verdict(torch.cat(tallies[i].losses).numpy())
        return tallies

    def evaluate_many(
        self, candidates: Sequence[Candidate], incumbents: Sequence[Incumbent | None] = ()
    ) -> list[Evaluation]:
        """Quality on the search split and every cost; seconds are an equal share of the time.

        Args:
            candidates: to evaluate.
            incumbents: for each, the known candidate that it is given up for as soon as that one
                is sure to be better; None, or no incumbents at all: evaluated to the end.
        """
        started = time.perf_counter()
        tallies = self._tallies(candidates, "search", incumbents)
        seconds = (time.perf_counter() - started) / max(1, len(candidates))
        return [
            replace(
                self._evaluation(candidate, tally),
                costs={n: c.cost(self.traced.graph, candidate) for n, c in self.costs.items()},
                seconds=seconds,
            )
            for candidate, tally in zip(candidates, tallies, strict=True)
        ]

    def _evaluation(self, candidate: Candidate, tally: Tally) -> Evaluation:
        """What the search split says, without costs."""
        judge, stop = self.judge("search"), tally.stop
        if stop is None:
            m = judge.conclude(tally)
            return Evaluation(
                candidate=candidate,
                loss=m.loss,
                loss_stderr=m.loss_stderr,
                metric=m.metric,
                agreement=m.agreement,
                costs={},
                sample_losses=torch.cat(tally.losses).numpy().astype(np.float32),
            )
        n_left = judge.split.n_samples - stop.n_samples
        notes = {SAMPLES: float(stop.n_samples), SAMPLES_LEFT: float(n_left)}
        if math.isfinite(stop.estimate):
            notes[ESTIMATE] = stop.estimate
        return Evaluation(candidate, stop.bound, None, {}, pruned=True, notes=notes)

    def transforms(self, candidate: Candidate) -> dict[int, Transform]:
        """Node index to fake quantizer, for every quantized edge of the candidate."""
        return _fake_quantizers(self._quantizers(candidate))

    def _quantizers(self, candidate: Candidate) -> dict[int, ActivationQuant]:
        return self._at_nodes(self.bank.activations(candidate))

    def _at_nodes(self, quantizers: Mapping[str, ActivationQuant]) -> dict[int, ActivationQuant]:
        return {
            edge.node: quantizers[edge.name]
            for edge in activation_edges(self.traced.graph)
            if edge.name in quantizers
        }

    def _run(
        self, params: Params, transforms: Mapping[int, Transform], inputs: tuple[Tensor, ...]
    ) -> Any:
        outputs, _ = self._executor.run(params, inputs, transforms=transforms)
        return self._tree(outputs)

    def _tree(self, outputs: tuple[Tensor, ...]) -> Any:
        return pytree.tree_unflatten(list(outputs), self.traced.out_spec)


def _fake_quantizers(quantizers: Mapping[int, ActivationQuant]) -> dict[int, Transform]:
    return {node: quant.fake_quantize for node, quant in quantizers.items()}
