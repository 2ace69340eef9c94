"""What the outputs say of every channel's weights: first-order Taylor and trace of the Hessian."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.executor import Executor
from quant_ops.graph import Graph, Params
from quant_ops.layout import to_canonical
from quant_ops.sensitivity import OutputGradient

DRAWS = 4  # backward passes per batch


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGradients:
    """Per output channel, each (out_channels,).

    Attributes:
        taylor: mean over samples of (sum of w dL/dw)^2 over the channel's weights.
        trace: mean over samples of the sum of (dL/dw)^2: Fisher's form of the Hessian's trace.
    """

    taylor: NDArray[np.float64]
    trace: NDArray[np.float64]


def channel_gradients(
    graph: Graph,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    output_gradient: OutputGradient,
    *,
    seed: int = 0,
) -> dict[str, ChannelGradients]:
    """Squared gradients of the divergence from the network's own outputs; labels are not needed.

    At the float network the gradient itself is 0; its squares under outputs drawn from the
    network's own answer are not, and they are the curvature [Molchanov2019]. Every sample's
    gradient gets a random sign, so that the square of a batch's sum is, in the mean over draws,
    the sum of the samples' squares.

    Args:
        graph: the network.
        params: its float parameters.
        batches: (inputs, target) pairs; targets are ignored.
        output_gradient: `sampled_label_gradient` for logits, `gaussian_gradient` elsewhere.
        seed: of the draws.
    """
    layers = [layer for layer in graph.searchable_layers if params[layer.weight].dim() > 1]
    learned = {x.weight: params[x.weight].detach().clone().requires_grad_() for x in layers}
    executor, generator = Executor(graph), torch.Generator().manual_seed(seed)
    taylor = {x.name: np.zeros(x.out_channels) for x in layers}
    trace = {x.name: np.zeros(x.out_channels) for x in layers}
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
                    weights = to_canonical(layer, params[layer.weight]).flatten(1).double()
                    taylor[layer.name] += (rows * weights).sum(1).square().numpy()
                    trace[layer.name] += rows.square().sum(1).numpy()
        count += len(outputs[0])
    scale = 1 / max(1, count * DRAWS)
    return {x.name: ChannelGradients(taylor[x.name] * scale, trace[x.name] * scale) for x in layers}


def _with_signs(gradient: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (len(gradient),), generator=generator) * 2.0 - 1.0
    return gradient * signs.reshape(-1, *[1] * (gradient.dim() - 1))
