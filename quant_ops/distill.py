"""Label-free distillation of the whole network: scales, biases and steps move, codes do not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Params
from quant_ops.quantized import QuantizedModel
from quant_ops.reconstruct import OutputLoss
from quant_ops.samples import Samples
from quant_ops.soft import SoftActivation, SoftLayer


@dataclass(frozen=True, slots=True)
class DistillationSettings:
    """How the network is distilled.

    Attributes:
        epochs: over the calibration data.
        batch: samples of a step; None keeps the given batches whole.
        rate: of Adam, falling to 0 as a cosine.
        seed: of the mini-batches.
    """

    epochs: float = 2.0
    batch: int | None = 32
    rate: float = 3e-4
    seed: int = 0


def kl_loss(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean divergence of logits (batch, classes, *positions) from the float ones [Hinton2015]."""
    losses = [
        functional.kl_div(y.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
        .sum(dim=1)
        .mean()
        for y, t in zip(outputs, wanted, strict=True)
    ]
    return torch.stack(losses).sum()


def squared_loss(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over outputs of |y - f|^2 / |f|^2; outputs that are not floating point count nothing."""
    losses = [
        (y - t).square().sum() / t.square().sum().clamp_min(1e-12)
        for y, t in zip(outputs, wanted, strict=True)
        if t.is_floating_point()
    ]
    return torch.stack(losses).mean()


def distill(
    model: QuantizedModel,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    *,
    output_loss: OutputLoss = kl_loss,
    settings: DistillationSettings | None = None,
) -> QuantizedModel:
    """Move scales, biases and activation steps such that outputs are nearer to the float ones.

    Args:
        model: where to start; its codes stay.
        params: the float parameters.
        batches: (inputs, target) pairs; targets are ignored.
        output_loss: what to minimise.
        settings: of the learning.
    """
    settings = settings or DistillationSettings()
    samples = Samples(batches, settings.batch)
    executor = Executor(model.graph)
    float_outputs = samples.map(lambda *x: executor(params, x), *samples.inputs)
    layers = {
        name: SoftLayer(model.graph.layer_of[name], quantized, None)
        for name, quantized in model.layers.items()
        if model.graph.layer_of[name].kind != "embedding"
    }
    edges = {e.name: e.node for e in activation_edges(model.graph) if e.name in model.activations}
    steps = {name: SoftActivation(model.activations[name]) for name in edges}
    hooks: dict[int, Transform] = {edges[name]: soft for name, soft in steps.items()}
    learned = [s.log_scale for s in layers.values()] + [s.log_scale for s in steps.values()]
    learned += [s.bias for s in layers.values() if s.bias is not None]
    optimizer = torch.optim.Adam(learned, lr=settings.rate)
    total = max(1, round(settings.epochs * samples.per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    inputs, targets = ([samples.joined(v) for v in x] for x in (samples.inputs, float_outputs))
    now: dict[str, Tensor] = model.params()
    for picked in samples.draw(total, torch.Generator().manual_seed(settings.seed)):
        for name, soft in layers.items():
            layer, bias = model.graph.layer_of[name], soft.live_bias()
            now[layer.weight] = soft.weight()
            if layer.bias is not None and bias is not None:
                now[layer.bias] = bias
        outputs = executor.run_with_grad(now, [samples.take(v, picked) for v in inputs], hooks)
        loss = output_loss(outputs, [samples.take(v, picked) for v in targets])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return replace(
        model,
        layers={**model.layers, **{name: soft.result() for name, soft in layers.items()}},
        activations={**model.activations, **{name: s.result() for name, s in steps.items()}},
    )
