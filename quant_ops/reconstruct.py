"""Block by block: rounding, scales, biases and activation steps that restore the float outputs."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_ops.blocks import Block, joined, split_into_blocks
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Graph, Params
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel
from quant_ops.samples import Samples, Values
from quant_ops.soft import SoftActivation, SoftLayer

OutputLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(outputs, float outputs) -> scalar, differentiable."""


@dataclass(frozen=True, slots=True)
class ReconstructionSettings:
    """How a block is learned.

    Attributes:
        steps: per window.
        window: blocks that are learned together; the next window begins one block later, so that
            a block is learned with what follows it and again with what precedes it [Ding2023].
        batch: samples of a step; None keeps the given batches whole.
        rounding_rate, scale_rate, bias_rate, step_rate: of Adam; the last for activations.
        pull: weight of the term that makes codes whole, relative to the block's first error.
        free: share of the steps without that term.
        drop: how often an activation is left float while weights are learned [Wei2022]; only
            where activations are quantized.
        seed: of mini-batches and drops.
    """

    steps: int = 200
    window: int = 1
    batch: int | None = 32
    rounding_rate: float = 0.05
    scale_rate: float = 1e-3
    bias_rate: float = 1e-3
    step_rate: float = 1e-2
    pull: float = 5.0
    free: float = 0.2
    drop: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """Layers and activation quantizers by name."""

    layers: Mapping[str, QuantizedLayer]
    activations: Mapping[str, ActivationQuant]

    def put_into(self, model: QuantizedModel) -> QuantizedModel:
        """The model with these instead of its own."""
        return replace(
            model,
            layers={**model.layers, **self.layers},
            activations={**model.activations, **self.activations},
        )


def reconstruct(
    model: QuantizedModel,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    wanted: Mapping[str, Tensor],
    *,
    output_loss: OutputLoss,
    sensitivity: Mapping[int, Tensor] | None = None,
    settings: ReconstructionSettings | None = None,
    known: MutableMapping[bytes, Learned] | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizedModel:
    """Learn the codes block by block, each on the inputs that the blocks before it now give.

    A block keeps what it had where whole codes come out worse than that on the samples.
    [Nagel2020], [Li2021]. Labels are not needed; widths and sizes stay. The same under one seed
    and thread count. Values of one block are held in memory for all samples.

    Args:
        model: where to start, best from second-order rounding.
        params: the float parameters.
        batches: (inputs, target) pairs; targets are ignored.
        wanted: layer name to real weights, as `round_layer` gives; a layer without keeps its
            codes.
        output_loss: of the network's outputs, for the last block.
        sensitivity: node index to channel weights of squared errors, for the other blocks.
        settings: of the learning.
        known: what was learned before, by everything that it depends on; models of one network
            that begin alike share their first blocks. New results are added.
        on_block: told (done, total).
    """
    settings = settings or ReconstructionSettings()
    samples = Samples(batches, settings.batch)
    graph = model.graph
    blocks = split_into_blocks(graph)
    values = _Values(graph, params, samples)
    quantized = float_inputs = samples.inputs
    known = {} if known is None else known
    trace = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    n_windows = max(1, len(blocks) - settings.window + 1)
    for done in range(n_windows):
        inside = blocks[done : done + settings.window]
        window, is_last = joined(graph, inside), done + 1 == n_windows
        targets = values.outputs(window, params, {}, float_inputs)
        goal = _Goal(window, targets, output_loss if is_last else None, sensitivity)
        learner = _BlockLearner(model, window, wanted, settings)
        trace.update(learner.origin())
        if learner.learns and trace.digest() not in known:
            learner.learn(samples, values, (quantized, float_inputs), goal, seed=done + 1)
            tried = [learner.updated(model), model]
            errors = [goal.mean_loss(values.quantized(window, m, quantized)) for m in tried]
            known[trace.digest()] = learner.part_of(tried[errors.index(min(errors))])
        if learner.learns:
            model = known[trace.digest()].put_into(model)
        if not is_last:
            quantized = values.quantized(inside[0], model, quantized)
            float_inputs = values.outputs(inside[0], params, {}, float_inputs)
        on_block(done + 1, n_windows)
    return model


class _Values:
    """Runs blocks chunk by chunk; knows the sizes that enter them beside the one value."""

    def __init__(self, graph: Graph, params: Params, samples: Samples) -> None:
        self._executor = Executor(graph)
        self._params = params
        self._samples = samples
        self._side: dict[tuple[int, int], Any] = {}

    def outputs(
        self, block: Block, params: Params, hooks: Mapping[int, Transform], inputs: list[Values]
    ) -> list[Values]:
        executor = Executor(block.graph)

        def run(*parts: Tensor) -> Sequence[Any]:
            side = self.side(block, len(parts[0]))
            return executor.run(params, [*parts, *side], transforms=hooks)[0]

        return self._samples.map(run, *inputs)

    def quantized(self, block: Block, model: QuantizedModel, inputs: list[Values]) -> list[Values]:
        """What the block of `model` makes of `inputs`."""
        return self.outputs(block, model.params(), _hard_transforms(model, block), inputs)

    def side(self, block: Block, n: int) -> list[Any]:
        """What enters a block beside its input, for a batch of `n`."""
        if block.start == 0 or len(block.sources) == 1:
            return []
        nodes = block.sources[1:]
        if any((node, n) not in self._side for node in nodes):
            whole = next(
                parts for parts in zip(*self._samples.inputs, strict=True) if len(parts[0]) >= n
            )
            inputs = [x[:n] for x in whole]
            found = self._executor.run(self._params, inputs, keep=nodes)[1]
            self._side.update({(node, n): found[node] for node in nodes})
        return [self._side[node, n] for node in nodes]


class _Goal:
    """What a block's outputs should be, and how far off they are."""

    def __init__(
        self,
        block: Block,
        targets: list[Values],
        output_loss: OutputLoss | None,
        sensitivity: Mapping[int, Tensor] | None,
    ) -> None:
        self.targets = targets
        self._output_loss = output_loss
        self._weight = (sensitivity or {}).get(block.targets[0], torch.ones(()))
        power = sum(float(x.var(dim=0).mean()) for x in targets[0]) / len(targets[0])
        self._power = power if power > 0 else 1.0

    def mean_loss(self, outputs: list[Values]) -> float:
        """Over all samples; infinite where it is not a number."""
        with torch.no_grad():
            total = sum(
                float(self.loss(y, t)) * len(y[0])
                for y, t in zip(
                    zip(*outputs, strict=True), zip(*self.targets, strict=True), strict=True
                )
            )
        return total if np.isfinite(total) else np.inf

    def loss(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        if self._output_loss is not None:
            return self._output_loss(outputs, wanted)
        (y,), (target,) = outputs, wanted
        return ((y - target).square() * self._weight).mean() / self._power


class _BlockLearner:
    """What is learned of one block."""

    def __init__(
        self,
        model: QuantizedModel,
        block: Block,
        wanted: Mapping[str, Tensor],
        settings: ReconstructionSettings,
    ) -> None:
        self._block = block
        self._settings = settings
        self._layers = {
            name: SoftLayer(block.graph.layer_of[name], model.layers[name], wanted.get(name))
            for name in block.layers
            if name in model.layers and block.graph.layer_of[name].kind != "embedding"
        }
        self._activations = {
            name: (node, SoftActivation(model.activations[name]))
            for name, node in _edges_inside(model, block).items()
        }
        self._start, self._wanted = self.part_of(model), wanted
        self._params: dict[str, Tensor] = model.params()

    @property
    def learns(self) -> bool:
        return bool(self._layers or self._activations)

    def learn(
        self,
        samples: Samples,
        values: _Values,
        inputs: tuple[list[Values], list[Values]],
        goal: _Goal,
        *,
        seed: int,
    ) -> None:
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed * 1000 + seed)
        quantized, floats = ([samples.joined(v) for v in side] for side in inputs)
        targets = [samples.joined(v) for v in goal.targets]
        executor = Executor(self._block.graph)
        optimizer = torch.optim.Adam(self._groups())
        drops = bool(self._activations)
        hooks = {
            node: _dropped(a, generator, settings.drop) for node, a in self._activations.values()
        }
        first = 0.0
        for step, picked in enumerate(samples.draw(settings.steps, generator)):
            parts = [samples.take(v, picked) for v in quantized]
            if drops:
                whole = [samples.take(v, picked) for v in floats]
                parts = [
                    _mixed(q, x, generator, settings.drop)
                    for q, x in zip(parts, whole, strict=True)
                ]
            side = values.side(self._block, len(parts[0]))
            outputs = executor.run_with_grad(self._soft_params(), [*parts, *side], hooks)
            error = goal.loss(outputs, [samples.take(v, picked) for v in targets])
            first = first or float(error.detach())
            loss = error + settings.pull * first * self._indecision(step / settings.steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def updated(self, model: QuantizedModel) -> QuantizedModel:
        learned = {name: soft.result() for name, soft in self._layers.items()}
        steps = {name: soft.result() for name, (_, soft) in self._activations.items()}
        return Learned(learned, steps).put_into(model)

    def part_of(self, model: QuantizedModel) -> Learned:
        """What is learned here, as it is in `model`."""
        return Learned(
            {name: model.layers[name] for name in self._layers},
            {name: model.activations[name] for name in self._activations},
        )

    def origin(self) -> bytes:
        """What the result depends on beside the blocks before."""
        parts = [layer.content() for layer in self._start.layers.values()]
        parts += [self._wanted[n].numpy().tobytes() for n in self._layers if n in self._wanted]
        return b"".join([*parts, repr(self._start.activations).encode()])

    def _soft_params(self) -> dict[str, Tensor]:
        for name, soft in self._layers.items():
            layer = self._block.graph.layer_of[name]
            self._params[layer.weight] = soft.weight()
            bias = soft.live_bias()
            if layer.bias is not None and bias is not None:
                self._params[layer.bias] = bias
        return self._params

    def _groups(self) -> list[dict[str, Any]]:
        s, layers = self._settings, self._layers.values()
        kinds: list[tuple[float, list[Tensor | None]]] = [
            (s.rounding_rate, [x.choice for x in layers]),
            (s.scale_rate, [x.log_scale for x in layers]),
            (s.bias_rate, [x.bias for x in layers]),
            (s.step_rate, [a.log_scale for _, a in self._activations.values()]),
        ]
        return [
            {"params": [t for t in tensors if t is not None], "lr": rate}
            for rate, tensors in kinds
            if any(t is not None for t in tensors)
        ]

    def _indecision(self, share: float) -> Tensor:
        free = self._settings.free
        if share < free:
            return torch.zeros(())
        left = 0.5 * (1 + np.cos(np.pi * (share - free) / (1 - free)))
        terms = [soft.indecision(2 + 18 * float(left)) for soft in self._layers.values()]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def _edges_inside(model: QuantizedModel, block: Block) -> dict[str, int]:
    """Edge name to node of the block's graph, for the quantized edges whose value arises there."""
    index_of = block.graph.index_of
    names = [node.name for node in model.graph.nodes]
    first = block.start == 0
    return {
        edge.name: index_of[names[edge.node]]
        for edge in activation_edges(model.graph)
        if edge.name in model.activations
        and (block.start <= edge.node < block.stop or (first and edge.kind == "input"))
    }


def _hard_transforms(model: QuantizedModel, block: Block) -> dict[int, Transform]:
    return {
        node: model.activations[name].fake_quantize
        for name, node in _edges_inside(model, block).items()
    }


def _dropped(soft: SoftActivation, generator: torch.Generator, share: float) -> Transform:
    return lambda x: _mixed(soft(x), x, generator, share)


def _mixed(quantized: Tensor, x: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """The quantized value, but `share` of its elements left float."""
    return torch.where(torch.rand(x.shape, generator=generator) < share, x, quantized)
