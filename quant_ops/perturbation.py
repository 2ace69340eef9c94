"""What single layers at single widths do to the outputs, for all widths from one set of gradients.

A layer's quantization adds a known change to its output. Carried to the network's outputs by
their gradients, it predicts the loss without running the rest of the network: one evaluation of
the layer per width, and a few backward passes for everything.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.graph import Layer, Ref
from quant_ops.operators import EMBEDDING
from quant_ops.sensitivity import OutputGradient

Cotangents = list[Sequence[Tensor]]  # per backward pass, one tensor per output
MOST_CLASSES = 32  # up to so many, every logit gets a backward pass of its own
DRAWS = 4  # backward passes otherwise


@dataclass(frozen=True)
class Measure:
    """How gradients and a change make a loss.

    Attributes:
        summary: one line.
        every_class: whether a backward pass is wanted for every logit, or for drawn gradients.
        score: (gradients (passes, batch, n), change (batch, n), logits) to (batch,) losses.
    """

    summary: str
    every_class: bool
    score: Callable[[Tensor, Tensor, Tensor], Tensor]


def _linearized(gradients: Tensor, change: Tensor, logits: Tensor) -> Tensor:
    moved = logits + torch.einsum("pbn,bn->bp", gradients, change)
    before, after = logits.log_softmax(1).double(), moved.log_softmax(1).double()
    return (before.exp() * (before - after)).sum(dim=1)


def _gauss_newton(gradients: Tensor, change: Tensor, logits: Tensor) -> Tensor:
    moved = torch.einsum("pbn,bn->bp", gradients, change)
    return 0.5 * moved.double().square().mean(dim=1)


def _fisher(gradients: Tensor, change: Tensor, logits: Tensor) -> Tensor:
    diagonal = gradients.square().mean(dim=0)
    return 0.5 * (diagonal * change.square()).double().sum(dim=1)


def _trace(gradients: Tensor, change: Tensor, logits: Tensor) -> Tensor:
    curvature = gradients.square().double().mean(dim=(0, 1)).mean()
    return 0.5 * curvature * change.square().double().sum(dim=1)


def _gradient_l1(gradients: Tensor, change: Tensor, logits: Tensor) -> Tensor:
    return (gradients.abs().mean(dim=0) * change.abs()).double().sum(dim=1)


MEASURES: dict[str, Measure] = {
    "linearized": Measure("divergence of the outputs of the linearized network", True, _linearized),
    "gauss-newton": Measure("second order of the divergence, labels drawn", False, _gauss_newton),
    "fisher": Measure("its diagonal at the layer's output [Li2021]", False, _fisher),
    "hessian-trace": Measure("its mean curvature x squared change [Dong2020]", False, _trace),
    "gradient-l1": Measure("gradient x change, magnitudes [Alizadeh2020]", False, _gradient_l1),
}


def predicted_losses(
    bank: WeightBank,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    changes: Sequence[Candidate],
    measure: str,
    output_gradient: OutputGradient,
    *,
    logits: bool,
    seed: int = 0,
) -> list[float]:
    """Mean loss of each change alone, the rest of the network float.

    Departures: curvatures are taken at a layer's output and not at its weights, so that they see
    what the inputs do; the loss is the divergence from the float network's own answer.

    Args:
        bank: of the network.
        batches: (inputs, target) pairs; targets are ignored.
        changes: each names one layer of one width (and the residual beside it, if both are
            meant), or one activation edge.
        measure: a row of `MEASURES`; "linearized" is "gauss-newton" where the outputs are not one
            tensor of at most 32 logits.
        output_gradient: draws output gradients whose mean outer product is the loss's curvature.
        logits: whether the outputs are class scores.
        seed: of the draws.

    Raises:
        ValueError: no such measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"distortion measure {measure!r} is not one of {', '.join(MEASURES)}")
    predictor = Predictor(bank, changes)
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(len(changes), dtype=torch.float64)
    count = 0
    for inputs, _ in batches:
        run = predictor.forward(inputs)
        few = logits and has_few_classes(run)
        chosen = MEASURES[measure if few or measure != "linearized" else "gauss-newton"]
        if chosen.every_class:
            cotangents = of_every_class(run.outputs[0])
        else:
            cotangents = drawn(run, output_gradient, generator)
        totals += predictor.score(run, cotangents, chosen)
        count += len(run.outputs[0])
    return [float(total) / max(1, count) for total in totals]


@dataclass
class Run:
    """One batch: outputs, what is added to watched values (zeros), kept values."""

    outputs: tuple[Tensor, ...]
    added: Mapping[int, Tensor]
    values: Mapping[int, Tensor]


def has_few_classes(run: Run) -> bool:
    """Whether the only output is (batch, classes) with at most 32 classes."""
    (first, *others) = run.outputs
    return not others and first.dim() == 2 and first.shape[1] <= MOST_CLASSES


def of_every_class(logits: Tensor) -> Cotangents:
    """One backward pass per logit."""
    return [(row.expand_as(logits),) for row in torch.eye(logits.shape[1])]


def drawn(run: Run, draw: OutputGradient, generator: torch.Generator) -> Cotangents:
    """A few draws of the output's gradient."""
    outputs = [y.detach() for y in run.outputs]
    return [draw(outputs, generator) for _ in range(DRAWS)]


class Predictor:
    """Runs the float network once per batch and asks what changes of single layers would do.

    Args:
        bank: of the network.
        changes: each names one layer of one width, or one activation edge.
    """

    def __init__(self, bank: WeightBank, changes: Sequence[Candidate]) -> None:
        self._bank = bank
        self._changes = changes
        self._executor = Executor(bank.graph)
        self._node_of = {edge.name: edge.node for edge in activation_edges(bank.graph)}
        self._at: dict[int, list[int]] = {}  # watched node to the changes that happen there
        for number, change in enumerate(changes):
            for node in self._nodes(change):
                self._at.setdefault(node, []).append(number)

    def _nodes(self, change: Candidate) -> list[int]:
        # what a residual layer adds is seen at its main layer, which comes first
        main = change.layers[:1]
        sites = [s for name, _ in main for s in self._bank.graph.layer_of[name].sites]
        return sites + [self._node_of[name] for name, _ in change.activations]

    def forward(self, inputs: Sequence[Tensor]) -> Run:
        """Outputs and the values at the places of all changes, ready for gradients."""
        graph, added, values = self._bank.graph, dict[int, Tensor](), dict[int, Tensor]()
        sources = {
            arg.index for n in self._at for arg in graph.nodes[n].args[:2] if isinstance(arg, Ref)
        }

        def watch(index: int) -> Callable[[Tensor], Tensor]:
            def look(value: Tensor) -> Tensor:
                values[index] = value.detach()
                if index not in self._at or not value.is_floating_point():
                    return value
                added[index] = torch.zeros_like(value, requires_grad=True)
                return value + added[index]

            return look

        hooks = {index: watch(index) for index in sources | set(self._at)}
        outputs = self._executor.run_with_grad(self._bank.float_params, inputs, hooks)
        return Run(outputs, added, values)

    def gradients(
        self, run: Run, cotangents: Cotangents
    ) -> Iterator[tuple[int, Sequence[int], Tensor]]:
        """(node, numbers of the changes there, gradients (passes, *value)) where there are some."""
        nodes = [node for node in self._at if node in run.added]
        live = [i for i, y in enumerate(run.outputs) if y.requires_grad]
        passes = [
            torch.autograd.grad(
                [run.outputs[i] for i in live],
                [run.added[node] for node in nodes],
                [cotangent[i] for i in live],
                retain_graph=True,
                allow_unused=True,
            )
            for cotangent in cotangents
        ]
        for at, node in enumerate(nodes):
            found = [grads[at] for grads in passes]
            if all(gradient is not None for gradient in found):
                yield node, self._at[node], torch.stack(found)

    def score(self, run: Run, cotangents: Cotangents, measure: Measure) -> Tensor:
        """(changes,) summed losses of one batch."""
        totals = torch.zeros(len(self._changes), dtype=torch.float64)
        logits = run.outputs[0].detach()
        for node, numbers, gradients in self.gradients(run, cotangents):
            flat = gradients.flatten(2)
            for number in numbers:
                with torch.inference_mode():
                    change = self.change(self._changes[number], node, run.values).flatten(1)
                    totals[number] += measure.score(flat, change, logits).sum()
        return totals

    def change(self, change: Candidate, node: int, values: Mapping[int, Tensor]) -> Tensor:
        """What a change adds to the value of one node."""
        if change.activations:
            ((name, _),) = change.activations
            quantizer = self._bank.activations(change)[name]
            return quantizer.fake_quantize(values[node]) - values[node]
        name = change.layers[0][0]
        layer, quantized = self._bank.graph.layer_of[name], self._bank.quantize(change).layers
        weight = -self._bank.float_params[layer.weight]
        for part in quantized.values():
            weight = weight + part.weight(layer)
        bias = quantized[name].bias_values()
        if layer.bias is not None and bias is not None:
            bias = bias - self._bank.float_params[layer.bias]
        return _apply(self._executor, layer, node, values, weight, bias)


def _apply(
    executor: Executor,
    layer: Layer,
    site: int,
    values: Mapping[int, Tensor],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The layer's operator on its input with other parameters."""
    node = executor.graph.nodes[site]
    source = node.args[1 if node.op in EMBEDDING else 0]
    assert isinstance(source, Ref)
    params = {layer.weight: weight}
    if layer.bias is not None:
        params[layer.bias] = bias if bias is not None else torch.zeros(layer.out_channels)
    changed: Tensor = executor.compute(site, params, {source.index: values[source.index]})
    return changed
