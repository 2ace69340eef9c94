"""From a task to everything a search needs: traced network, splits, calibration, evaluator."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cost_models.base import CostModel
from cost_models.fpga.families import DEFAULT, family
from cost_models.latency.model import Latency
from cost_models.table import FPGA_COSTS, cost_model
from quant_ops.bank import WeightBank
from quant_ops.calibration import Calibration, calibrate
from quant_ops.dual import SUFFIX
from quant_ops.edges import activation_edges
from quant_ops.equalize import absorb_high_biases, equalize
from quant_ops.errors import UsageError
from quant_ops.executor import Executor
from quant_ops.expected_inputs import data_free
from quant_ops.moments import InputMoments, collect_moments
from search.blame import blaming
from search.budget import Budgets
from search.capture import Traced, trace
from search.choices import build_space
from search.config import RunConfig
from search.data import EVALUATION_BATCH, Split, batch_size, load_split
from search.dual_layers import dual_layers, with_dual
from search.evaluator import Evaluator
from search.latency import latency_model
from search.quality import QualityLoss, is_kl, metric_loss, quality_function, worst_loss
from search.space import SearchSpace
from search.task import Metric, Task

ALWAYS_COSTED = ("size_bytes", "macs", "bops", "ebops", "ram_bytes", "energy_nj")


@dataclass(frozen=True)
class EvaluatorSpec:
    """What a worker process needs to build an evaluator of its own."""

    traced: Traced
    original: Traced
    calibration: Calibration
    splits: Mapping[str, Split]
    quality_loss: QualityLoss
    by_target: bool
    task_metric: Metric
    range_setter: str
    activation_ranges: str | None
    correction: str
    moments: Mapping[str, InputMoments] = field(default_factory=dict)
    latency: Latency | None = None
    fpga: str | None = None

    def __call__(self) -> Evaluator:
        bank = WeightBank(
            self.traced.graph,
            self.traced.params,
            self.calibration,
            range_setter=self.range_setter,
            activation_ranges=self.activation_ranges,
            bias_correction=self.correction != "none",
            # second-order rounding keeps the spread by itself
            spread_correction=self.correction == "mean-spread" and not self.moments,
            moments=self.moments,
        )
        names = ALWAYS_COSTED + (() if self.fpga is None else FPGA_COSTS)
        settings = {} if self.fpga is None else {"fpga": self.fpga}
        costs = [cost_model(name) for name in names]
        if self.latency is not None:
            costs.append(self.latency)
        return Evaluator(
            self.original,
            bank,
            self.splits,
            quality_loss=self.quality_loss,
            by_target=self.by_target,
            metric=self.task_metric,
            costs={cost.name: cost.bound(bank, settings) for cost in costs},
        )


@dataclass(frozen=True)
class Prepared:
    """A task made ready for searching."""

    task: Task
    config: RunConfig
    traced: Traced
    space: SearchSpace
    spec: EvaluatorSpec

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator of this process."""
        return self.spec()

    @property
    def costs(self) -> Mapping[str, CostModel]:
        """Cost-model name to model."""
        return self.evaluator.costs

    @cached_property
    def digests(self) -> dict[str, str]:
        """What must be the same for a resume: model, data, calibration."""
        return {
            "model": _params_digest(self.traced.params),
            "validation": self.spec.splits["validation"].digest(),
            "calibration": self.spec.splits["calibration"].digest(),
        }

    def worst_loss(self) -> float:
        """Loss of a useless model: the reference point of the hypervolume."""
        if self.spec.by_target:
            return 1.0 if self.task.worst_loss is None else self.task.worst_loss
        return worst_loss(self.task, self.evaluator.judge("validation").float_outputs)


def prepare(task: Task, config: RunConfig) -> Prepared:
    """Trace, read the splits, calibrate, build the space.

    Raises:
        UsageError: the task, the model or the settings cannot be used as given.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    fpga = fpga_family(config)
    original = trace(task.model, task.examples())
    batch = original.static_batch or EVALUATION_BATCH
    calibration_split = load_split(task.calibration, what="calibration", batch=batch)
    validation = load_split(task.validation, what="validation", batch=batch)
    for split in (calibration_split, validation):
        _require_batch(split, original.static_batch)
    space = build_space(original.graph, _of_captured(config))
    with blaming("the float model cannot be run on the task's calibration data"):
        traced, calibration = _made_easier(original, calibration_split, config)
    moments = {} if config.recover == "none" else _moments(traced, calibration_split)
    if config.dual:
        # statistics stay true: what is added is 0 in the float network
        names = dual_layers(traced, calibration, config)
        original, traced = with_dual(original, names), with_dual(traced, names)
        space = build_space(original.graph, config)
    splits = {
        "validation": validation,
        "search": validation.first(config.search_samples),
        "probe": validation.first(config.probe_samples),
        "calibration": calibration_split,
    }
    by_metric = config.objective == "metric"
    with blaming("the float model cannot be run on the task's validation data"):
        quality_loss = (
            metric_loss(task.metric) if by_metric else _divergence(task, original, validation)
        )
    spec = EvaluatorSpec(
        traced=traced,
        original=original,
        calibration=calibration,
        splits=splits,
        quality_loss=quality_loss,
        by_target=by_metric,
        task_metric=task.metric,
        range_setter=config.range_setter,
        activation_ranges=None if config.activation_ranges == "auto" else config.activation_ranges,
        correction=config.correction,
        moments=moments,
        latency=latency_model(config),
        fpga=fpga,
    )
    return Prepared(task, config, traced, space, spec)


def fpga_family(config: RunConfig) -> str | None:
    """The family whose costs are asked for, None where no FPGA is.

    Raises:
        UsageError: there is no fitted model of that family.
    """
    asks = set(FPGA_COSTS) & Budgets.parse(config.budgets).limits.keys()
    name = config.fpga or (DEFAULT if asks else None)
    return None if name is None else family(name).name


def _made_easier(traced: Traced, split: Split, config: RunConfig) -> tuple[Traced, Calibration]:
    """The network as `--prepare` leaves it, and what the calibration data say of that one."""
    graph = traced.graph
    edges = {edge.name: edge.node for edge in activation_edges(graph)}
    if "equalize" in config.prepare:
        params, divided = equalize(graph, traced.params)
        norms = {
            name: (beta / divided[name], gamma / divided[name])
            if name in divided
            else (beta, gamma)
            for name, (beta, gamma) in traced.norms.items()
        }
        traced = replace(traced, params=params, norms=norms)
    calibration = calibrate(graph, traced.params, split.batches, edges=edges)
    if "absorb" in config.prepare:
        mean, std = calibration.output_mean, calibration.output_std
        params, levels = absorb_high_biases(graph, traced.params, mean, std)
        norms = {
            name: (beta - levels.get(name, 0.0), gamma)
            for name, (beta, gamma) in traced.norms.items()
        }
        traced = replace(traced, params=params, norms=norms)
        calibration = calibrate(graph, traced.params, split.batches, edges=edges)
    if config.correction == "analytic":
        calibration = data_free(calibration, graph, traced.params, traced.norms)
    return traced, calibration


def _of_captured(config: RunConfig) -> RunConfig:
    """The settings without pins of residual layers, which the captured network does not have."""
    pins = {p: b for p, b in config.pins.items() if not (config.dual and p.endswith(SUFFIX))}
    return replace(config, pins=pins)


def _require_batch(split: Split, n_samples: int | None) -> None:
    """Batches of a split whose targets are no tensors stay as they came."""
    sizes = {batch_size(inputs) for inputs in split.inputs()}
    if n_samples is not None and sizes != {n_samples}:
        raise UsageError(
            f"the model takes batches of exactly {n_samples} sample, because torch.export could "
            f"not capture it for others; the task gives batches of {max(sizes)}: give batches of "
            f"{n_samples}, or rewrite what fixes the batch size"
        )


def require_sound_float(prepared: Prepared) -> None:
    """Measure the float model on the search split, whose outputs the evaluator keeps.

    Raises:
        UsageError: the model cannot take the data, its outputs are not finite, or the task's
            metric or quality loss cannot judge them.
    """
    evaluator = prepared.evaluator
    with blaming("the float model cannot be judged on the task's validation data"):
        measured = evaluator.measure_float(evaluator.judge("search"))
    if not math.isfinite(measured.loss):
        raise UsageError(
            "the float model's outputs, or its quality loss, are not finite on the task's "
            "validation data; check the inputs and the checkpoint"
        )


def _moments(traced: Traced, split: Split) -> dict[str, InputMoments]:
    return collect_moments(traced.graph, traced.params, split.batches)


def _divergence(task: Task, traced: Traced, validation: Split) -> QualityLoss:
    """The task's quality loss; a relative error is relative to the power over the whole split."""
    if is_kl(task):
        return quality_function(task)
    executor = Executor(traced.graph)
    outputs = [
        pytree.tree_unflatten(list(executor(traced.params, x)), traced.out_spec)
        for x in validation.inputs()
    ]
    return quality_function(task, outputs)


def _params_digest(params: Mapping[str, Tensor]) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        hasher.update(name.encode())
        hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()
