"""Corrections after quantization: they move stored scales and biases, never codes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.calibration import Calibration, ChannelSums
from quant_ops.dual import live_pairs
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Layer
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.stored import StoredBias

_FACTOR_LIMITS = (0.5, 2.0)  # a channel that needs more is broken, not merely shrunk


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


def spread_factor(rows: Tensor, quantized: Tensor) -> Tensor:
    """Factor (rows,) that gives the quantized weights the spread of the float ones [Banner2019].

    xi = |W - mean W| / |Wq - mean Wq| for each row; 1 where a row has no spread.
    """
    wanted, found = (
        torch.linalg.vector_norm(x.double() - x.double().mean(dim=1, keepdim=True), dim=1)
        for x in (rows, quantized)
    )
    return torch.where((wanted > 0) & (found > 0), wanted / found.clamp_min(1e-300), 1.0)


def mean_and_spread_corrected(rows: Tensor, quantized: Tensor) -> Tensor:
    """xi (Wq - mean Wq) + mean W for each row: the published correction in float [Banner2019].

    A file stores xi in the scale and the shift of the mean in the bias.
    """
    xi = spread_factor(rows, quantized)[:, None]
    wide = quantized.double()
    centered = wide - wide.mean(dim=1, keepdim=True)
    return (xi * centered + rows.double().mean(dim=1, keepdim=True)).float()


def rescaled(layer: QuantizedLayer, factor: NDArray[np.floating]) -> QuantizedLayer:
    """The layer with the scales of each channel times `factor` (out_channels,), codes kept."""
    widths = np.asarray(layer.bit_widths)
    scales = {
        width: stored.moved(factor[widths == width][:, None])
        for width, stored in layer.scales.items()
    }
    return replace(layer, scales=scales)


def reestimate_norms(
    model: QuantizedModel,
    calibration: Calibration,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
) -> QuantizedModel:
    """Give every channel's output the mean and spread it has in the float network [Sun2019].

    The folded network's form of re-estimating batch norms. One pass: each layer's input already
    carries the corrections of the layers before it (with the statistics of the batch at hand, so
    larger batches are more exact). Scales and biases move, codes do not. Layers that are called
    several times, and embeddings, stay; a layer with groups of weights, or with a residual beside
    it, only moves its bias.

    Args:
        model: the quantized network.
        calibration: statistics of the float network.
        batches: (inputs, target) pairs; targets are ignored.

    Raises:
        ValueError: there is no batch.
    """
    graph = model.graph
    together = live_pairs(model)
    sum_at = {main: pair.sites[0][2] for main, pair in together.items()}
    by_site = {
        sum_at.get(layer.name, layer.sites[0]): layer
        for layer in graph.layers
        if layer.name in model.layers and layer.bias is not None and len(layer.sites) == 1
    }
    estimates = {
        layer.name: _NormEstimate(
            layer, model.layers[layer.name], calibration, moves_scales=layer.name not in together
        )
        for layer in by_site.values()
    }
    transforms: dict[int, Transform] = {
        site: estimates[layer.name].correct for site, layer in by_site.items()
    }
    for name, activation in model.activations.items():
        site = graph.index_of[name]
        transforms[site] = _chain(transforms.get(site), activation.fake_quantize)
    executor, params, count = Executor(graph), model.params(), 0
    for inputs, _ in batches:
        executor.run(params, tuple(inputs), transforms=transforms)
        count += 1
    if not count:
        raise ValueError("re-estimation needs at least one batch")
    moved: Mapping[str, QuantizedLayer] = {n: e.result() for n, e in estimates.items()}
    return replace(model, layers={**model.layers, **moved})


def _chain(first: Transform | None, second: Transform) -> Transform:
    return second if first is None else lambda x: second(first(x))


class _NormEstimate:
    """Output statistics of one quantized layer, and the scales and biases that mend them."""

    def __init__(
        self,
        layer: Layer,
        quantized: QuantizedLayer,
        calibration: Calibration,
        *,
        moves_scales: bool,
    ) -> None:
        # groups, or two layers of one sum, would not move together
        self._moves_scales = moves_scales and quantized.channel_scales().shape[1] == 1
        self._axis = -1 if layer.kind == "linear" else 1
        self._quantized = quantized
        self._mean = calibration.output_mean[layer.name].double()
        self._std = calibration.output_std[layer.name].double()
        self._pooled = ChannelSums()

    def correct(self, y: Tensor) -> Tensor:
        """The output that the corrected layer would have had for this batch."""
        self._pooled.add(y, self._axis)
        sums = ChannelSums()
        sums.add(y, self._axis)
        _, factor = self._rescaled(sums)
        shift = self._live() * (self._mean - factor * sums.mean())
        shape = [1] * y.dim()
        shape[self._axis] = -1
        return y * factor.to(y.dtype).reshape(shape) + shift.to(y.dtype).reshape(shape)

    def result(self) -> QuantizedLayer:
        layer, factor = self._rescaled(self._pooled)
        assert layer.bias is not None
        bias = torch.from_numpy(layer.bias.values).double()
        wanted = self._live() * (self._mean + factor * (bias - self._pooled.mean()))
        return replace(layer, bias=StoredBias.nearest(wanted.numpy()))

    def _live(self) -> Tensor:
        return torch.tensor([width != 0 for width in self._quantized.bit_widths]).double()

    def _rescaled(self, sums: ChannelSums) -> tuple[QuantizedLayer, Tensor]:
        """The layer with its scales moved, and by how much each channel moved, as stored."""
        before = self._quantized.channel_scales().astype(np.float64)
        if not self._moves_scales:
            return self._quantized, torch.ones(len(before), dtype=torch.float64)
        std = sums.std()
        usable = (std > 1e-6 * self._std) & (self._std > 0)
        wanted = torch.where(usable, self._std / std.clamp_min(1e-300), 1.0)
        layer = rescaled(self._quantized, wanted.clamp(*_FACTOR_LIMITS).numpy())
        after = layer.channel_scales().astype(np.float64)
        factor = np.divide(after, before, out=np.ones_like(after), where=before > 0)
        return layer, torch.from_numpy(factor[:, 0])
