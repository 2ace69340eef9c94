"""Which layer of a network that gives no finite loss went first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_ops.qat.network import QuantizedNetwork


def broken_layer(network: QuantizedNetwork, inputs: Sequence[Tensor]) -> str:
    """The first layer whose output is not finite, else the first one backwards whose gradient is.

    Args:
        network: as it was when loss or gradient came out not finite.
        inputs: of the batch.
    """
    layers = network.trained_layers()
    for name in _by_site(network):
        weight = layers[name].latent.detach()
        if not bool(torch.isfinite(weight).all()):
            return name
    for name, output in network.layer_outputs(inputs).items():
        if not bool(torch.isfinite(output).all()):
            return name
    for name in reversed(_by_site(network)):
        gradients = [p.grad for p in layers[name].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            return name
    return "loss"


def _by_site(network: QuantizedNetwork) -> list[str]:
    layer_of = network.graph.layer_of
    return sorted(network.layer_names, key=lambda name: layer_of[name].sites[0])
