"""A quantized layer whose rounding, scales and biases can be learned."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quant_ops.graph import Layer
from quant_ops.layout import from_canonical
from quant_ops.quantized import ActivationQuant, QuantizedLayer
from quant_ops.rounding import grid_of, signed_codes, with_codes
from quant_ops.stored import StoredBias, StoredScale, ratio_values

_HEADROOM = 2  # how far the largest scale of a layer may grow; keeps the grid of stored scales
_STRETCH = (-0.1, 1.1)  # the sigmoid is stretched to this and clipped, so that it reaches 0 and 1
_INSIDE = 0.49  # in steps: a start from which rounding gives the codes it was given


class SoftLayer:
    """Codes floor + h with h between 0 and 1, to be pulled to either [Nagel2020].

    The scale of the forward pass is the stored one nearest to the learned one, always; its
    gradient passes that rounding unchanged [Bengio2013]. Pruned channels stay 0.

    Args:
        layer: the layer.
        quantized: where to start.
        wanted: (out_channels, n) the real weights whose nearest levels the codes are: where
            between two levels learning starts. None fixes the codes.

    Attributes:
        choice: (out_channels, n) what h is a sigmoid of; None where codes are fixed.
        log_scale: (out_channels, groups) natural logarithm of the scale.
        bias: (out_channels,), or None.
    """

    def __init__(self, layer: Layer, quantized: QuantizedLayer, wanted: Tensor | None) -> None:
        self._layer = layer
        self._quantized = quantized
        rows = (layer.out_channels, -1)
        grid = grid_of(layer, quantized)
        self._low, self._high, self._offset = (
            x.reshape(rows).float() for x in (grid.low, grid.high, grid.offset)
        )
        codes = signed_codes(quantized)
        self.choice: Tensor | None = None
        if wanted is None:
            self._floor = codes.float()
        else:
            steps = wanted / grid.scale.reshape(rows) - grid.offset.reshape(rows)
            near = codes + (steps - codes).clamp(-_INSIDE, _INSIDE)
            self._floor = near.floor().float()
            share = (near - near.floor()).clamp(0.01, 0.99).float()
            low, high = _STRETCH
            self.choice = torch.logit((share - low) / (high - low)).requires_grad_()
        widths = np.asarray(quantized.bit_widths)
        scales = quantized.channel_scales().astype(np.float64)
        bases = np.ones(len(widths))
        for width, stored in quantized.scales.items():
            bases[widths == width] = float(stored.base) * _HEADROOM
        self._live = torch.from_numpy(widths > 0)[:, None]
        self._base = torch.from_numpy(bases)[:, None].float()
        live = np.where(scales > 0, scales, 1.0)
        self.log_scale = torch.from_numpy(np.log(live)).float().requires_grad_()
        self.bias: Tensor | None = None
        if quantized.bias is not None:
            self.bias = torch.from_numpy(quantized.bias.values.copy()).requires_grad_()
        self._ratios = torch.from_numpy(ratio_values()).flip(0)
        log_ratios = self._ratios.log()
        self._middle = (log_ratios[1:] + log_ratios[:-1]) / 2

    def weight(self) -> Tensor:
        """The weight tensor in the operator's own layout, differentiable."""
        scale = self._stored_scale()
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self._floor.shape[1] // scale.shape[1], dim=1)
        codes = self._floor if self.choice is None else self._floor + self._share()
        codes = torch.minimum(torch.maximum(codes, self._low), self._high)
        values = torch.where(self._live, scale * (codes + self._offset), 0.0)
        kernel = self._layer.weight_shape[2:]
        return from_canonical(self._layer, values.reshape(self._layer.out_channels, -1, *kernel))

    def live_bias(self) -> Tensor | None:
        """The bias, 0 where the channel is pruned."""
        return None if self.bias is None else torch.where(self._live[:, 0], self.bias, 0.0)

    def indecision(self, sharpness: float) -> Tensor:
        """Mean of 1 - |2h - 1|^sharpness: 0 once every code is whole."""
        if self.choice is None:
            return torch.zeros(())
        return 1 - (2 * self._share() - 1).abs().pow(sharpness).mean()

    def result(self) -> QuantizedLayer:
        """The layer as it is stored, every code whole."""
        widths = np.asarray(self._quantized.bit_widths)
        with torch.no_grad():
            codes = self._floor if self.choice is None else self._floor + (self._share() >= 0.5)
            codes = torch.minimum(torch.maximum(codes, self._low), self._high)
            ratio = (255 - self._positions()).numpy().astype(np.uint8)
        scales = {
            width: StoredScale(np.float32(float(stored.base) * _HEADROOM), ratio[widths == width])
            for width, stored in self._quantized.scales.items()
        }
        out = replace(with_codes(self._quantized, codes.double()), scales=scales)
        bias = self.live_bias()
        if bias is None:
            return out
        return replace(out, bias=StoredBias.nearest(bias.detach().double().numpy()))

    def _share(self) -> Tensor:
        assert self.choice is not None
        low, high = _STRETCH
        return (torch.sigmoid(self.choice) * (high - low) + low).clamp(0, 1)

    def _positions(self) -> Tensor:
        relative = (self.log_scale - self._base.log()).detach()
        return torch.searchsorted(self._middle, relative.contiguous())

    def _stored_scale(self) -> Tensor:
        smooth = self.log_scale.exp()
        return smooth + (self._base * self._ratios[self._positions()] - smooth).detach()


class SoftActivation:
    """An activation quantizer whose step can be learned [Esser2020].

    Args:
        quant: where to start.
    """

    def __init__(self, quant: ActivationQuant) -> None:
        self._quant = quant
        self.log_scale = torch.tensor(quant.scale).log().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Nearest representable values; gradients reach x inside the range, and the step."""
        low, high = (end - self._quant.zero_point for end in self._quant.code_range)
        scale = self.log_scale.exp()
        steps = (x / scale).clamp(low, high)
        return (steps + (steps.round() - steps).detach()) * scale

    def result(self) -> ActivationQuant:
        """The quantizer as it is stored."""
        return replace(self._quant, scale=float(self.log_scale.detach().exp()))
