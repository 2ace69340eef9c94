"""How much each channel of a value matters to the outputs: one backward pass for all widths."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant_ops.executor import Executor
from quant_ops.graph import Graph, Params
from quant_ops.samples import Samples

OutputGradient = Callable[[Sequence[Tensor], torch.Generator], Sequence[Tensor]]
"""(outputs, generator) -> gradients whose mean outer product is the loss's curvature."""


def channel_sensitivity(
    graph: Graph,
    params: Params,
    samples: Samples,
    nodes: Sequence[int],
    output_gradient: OutputGradient,
    *,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Mean squared gradient per channel of each node's value: Fisher's diagonal [Li2021].

    Averaged over samples and positions and scaled to a mean of 1, so that it weighs squared
    errors of a value of shape (batch, channels, *positions); of a value with three axes, where
    channels may be either of two, over samples alone.

    Args:
        graph: the network.
        params: its float parameters.
        samples: inputs; labels are not needed.
        nodes: whose values.
        output_gradient: `sampled_label_gradient` for logits, `gaussian_gradient` elsewhere.
        seed: of the draws.
    """
    executor = Executor(graph)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, Tensor] = {}
    leaves = {i: torch.zeros(()) for i in nodes}

    def watch(index: int) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            # a first value that depends on nothing learned starts the chain
            value = value if value.requires_grad else value.detach().requires_grad_()
            leaves[index] = value
            return value

        return look

    for inputs in zip(*samples.inputs, strict=True):
        outputs = executor.run_with_grad(params, inputs, {i: watch(i) for i in nodes})
        reached = [leaves[i] for i in nodes]
        grads = torch.autograd.grad(
            [y for y in outputs if y.requires_grad],
            reached,
            [g for g, y in zip(_of(output_gradient, outputs, generator), outputs, strict=True)
             if y.requires_grad],
            allow_unused=True,
        )  # fmt: skip
        for index, value, gradient in zip(nodes, reached, grads, strict=True):
            square = torch.ones_like(value) if gradient is None else gradient.square()
            axes = [0, *range(2, square.dim())] if square.dim() != 3 else [0]
            total = square.mean(dim=axes, keepdim=True) * len(square)
            sums[index] = sums[index] + total if index in sums else total
    return {i: s / s.mean().clamp_min(1e-30) for i, s in sums.items()}


def _of(
    function: OutputGradient, outputs: Sequence[Tensor], generator: torch.Generator
) -> Sequence[Tensor]:
    return function([y.detach() for y in outputs], generator)


def sampled_label_gradient(
    outputs: Sequence[Tensor], generator: torch.Generator
) -> Sequence[Tensor]:
    """Of the cross-entropy with labels drawn from the model's own answer.

    The expected outer product is the Hessian of the divergence from that answer. Logits are
    (batch, classes, *positions).
    """
    out = []
    for logits in outputs:
        share = logits.softmax(dim=1)
        rows = share.movedim(1, -1).flatten(0, -2)
        label = torch.multinomial(rows, 1, generator=generator)
        hot = torch.zeros_like(rows).scatter_(1, label, 1.0)
        hot = hot.reshape(share.movedim(1, -1).shape).movedim(-1, 1)
        out.append(share - hot)
    return out


def gaussian_gradient(outputs: Sequence[Tensor], generator: torch.Generator) -> Sequence[Tensor]:
    """Of the squared error of outputs: white noise, whose outer product is the identity."""
    return [torch.randn(y.shape, generator=generator) for y in outputs]
