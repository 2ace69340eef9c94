"""The Hessian's trace over every channel's weights, from squared gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.executor import Executor
from quant_ops.graph import Graph, Params
from quant_ops.layout import to_canonical
from quant_ops.sensitivity import OutputGradient

DRAWS = 8  # backward passes per batch


def hessian_traces(
    graph: Graph,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    output_gradient: OutputGradient,
    *,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Layer name to (out_channels,): mean over samples of the sum of (dL/dw)^2.

    L is the divergence from the network's own outputs. Its gradient is 0 at the float network;
    the squares of gradients under outputs drawn from the network's own answer are its curvature
    in Gauss-Newton form. Every sample's gradient gets a random sign, so that the square of a
    batch's sum is, in the mean over draws, the sum of the samples' squares.

    Args:
        graph: the network.
        params: its float parameters.
        batches: (inputs, target) pairs; targets are ignored.
        output_gradient: `sampled_label_gradient` for logits, `gaussian_gradient` elsewhere.
        seed: of the draws.
    """
    layers = graph.searchable_layers
    learned = {x.weight: params[x.weight].detach().clone().requires_grad_() for x in layers}
    executor, generator = Executor(graph), torch.Generator().manual_seed(seed)
    traces = {x.name: np.zeros(x.out_channels) for x in layers}
    count = 0
    for inputs, _ in batches:
        outputs = executor.run_with_grad({**params, **learned}, inputs, {})
        live = [i for i, y in enumerate(outputs) if y.requires_grad]
        for _ in range(DRAWS):
            drawn = output_gradient([y.detach() for y in outputs], generator)
            gradients = torch.autograd.grad(
                [outputs[i] for i in live],
                list(learned.values()),
                [_with_signs(drawn[i], generator) for i in live],
                retain_graph=True,
                allow_unused=True,
            )
            for layer, gradient in zip(layers, gradients, strict=True):
                if gradient is not None:
                    rows = to_canonical(layer, gradient).flatten(1).double()
                    traces[layer.name] += rows.square().sum(1).numpy()
        count += len(outputs[0])
    return {name: trace / max(1, count * DRAWS) for name, trace in traces.items()}


def _with_signs(gradient: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (len(gradient),), generator=generator) * 2.0 - 1.0
    return gradient * signs.reshape(-1, *[1] * (gradient.dim() - 1))
