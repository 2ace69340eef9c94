"""Corrections after quantization: they move stored scales and biases, never codes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.graph import Layer


def corrected_bias(
    layer: Layer,
    bias: Tensor,
    weight: Tensor,
    quantized: Tensor,
    tap_mean: Tensor,
    live_inputs: NDArray[np.bool_] | None = None,
) -> Tensor:
    """The bias that keeps the mean output of every channel, float64 [Nagel2019].

    b' = b + sum over inputs and taps of E[x] (W - Wq), with Wq counted as 0 on removed inputs,
    whose constant thus moves into the bias.

    Args:
        layer: the layer.
        bias: (out_channels,).
        weight: canonical float weight.
        quantized: canonical quantized weight.
        tap_mean: (groups, in_channels / groups, *kernel) mean input met by each weight.
        live_inputs: (in_channels,) False where the input is removed; None if all are there.
    """
    mean = tap_mean.double().reshape(layer.groups, 1, -1)
    shape = (layer.groups, layer.out_channels // layer.groups, -1)
    if live_inputs is None:
        change = (weight.double() - quantized.double()).reshape(shape)
    else:
        live = torch.from_numpy(live_inputs).double().reshape(layer.groups, -1)
        live = live.repeat_interleave(mean.shape[2] // live.shape[1], dim=1)[:, None]
        change = weight.double().reshape(shape) - quantized.double().reshape(shape) * live
    return bias.double() + (change * mean).sum(dim=2).flatten()
