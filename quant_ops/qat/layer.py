"""One layer in training: latent weights, their quantizer, the bias, and perhaps a norm."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from quant_ops.graph import Layer
from quant_ops.layout import from_canonical, to_canonical
from quant_ops.qat.grid import stored_bias
from quant_ops.qat.norm import ChannelNorm
from quant_ops.qat.weights import LearnedStep
from quant_ops.quantized import QuantizedLayer
from quant_ops.rounding import grid_of, signed_codes
from quant_ops.stored import StoredBias


class TrainedLayer(nn.Module):
    """Latent weights behind a quantizer.

    Latent rows are kept at the size that a usual initialization gives weights, whatever norms
    were folded into them, so that one learning rate suits all: real weight = unit * latent, with
    a unit per channel that is a power of two and thus changes no code.

    Args:
        layer: the layer.
        weight: its float weight, in the operator's layout.
        quantized: how it is stored at the start.
        quantizer: any module from real weights (out_channels, n) to their fake-quantized values;
            None learns steps from the stored ones.
        rule: of learned steps, see `LearnedStep`.
        inside: how far, in steps, a latent weight may start from its code where rounding was
            not to the nearest level.

    Attributes:
        latent: (out_channels, n) parameter.
        bias: (out_channels,) parameter, or None; beta while there is a norm.
        norm: while it is not folded, else None.
    """

    unit: Tensor
    live: Tensor
    factor: Tensor
    bias_base: Tensor

    def __init__(
        self,
        layer: Layer,
        weight: Tensor,
        quantized: QuantizedLayer,
        *,
        quantizer: nn.Module | None = None,
        rule: str = "lsq",
        inside: float = 0.49,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._quantized = quantized
        canonical = to_canonical(layer, weight.detach()).reshape(layer.out_channels, -1).float()
        if quantizer is None:
            canonical = start_weights(layer, canonical, quantized, inside)
        unit = _unit(canonical)
        self.register_buffer("unit", unit)
        self.latent = nn.Parameter(canonical / unit)
        self.quantizer = quantizer or LearnedStep(quantized, unit=unit, rule=rule)
        live = torch.tensor(quantized.bit_widths) > 0
        self.register_buffer("live", live)
        self._all_live = bool(live.all())
        self.register_buffer("factor", torch.ones(layer.out_channels, 1))
        self.norm: ChannelNorm | None = None
        self.bias: nn.Parameter | None = None
        if quantized.bias is not None:
            self.bias = nn.Parameter(torch.from_numpy(quantized.bias.values.copy()))
            self.register_buffer("bias_base", torch.tensor(quantized.bias.base))

    def real_weights(self) -> Tensor:
        """(out_channels, n) what the quantizer sees."""
        return self.latent * self.unit

    def weight(self) -> Tensor:
        """The quantized weight in the operator's layout, differentiable."""
        values = self.quantizer(self.real_weights())
        if not isinstance(self.quantizer, LearnedStep):
            values = values * self.factor
        kernel = self.layer.weight_shape[2:]
        return from_canonical(self.layer, values.reshape(self.layer.out_channels, -1, *kernel))

    def float_weight(self) -> Tensor:
        """The latent weight with its norm folded in, in the operator's layout."""
        with torch.no_grad():
            values = self.real_weights() * self._total_factor()
            kernel = self.layer.weight_shape[2:]
            return from_canonical(self.layer, values.reshape(self.layer.out_channels, -1, *kernel))

    def float_bias(self) -> Tensor | None:
        """The bias with the norm folded in, not rounded."""
        if self.bias is None:
            return None
        bias = self.bias.detach()
        if self.norm is not None:
            bias = bias - self.norm.factor() * self.norm.mean
        return torch.where(self.live, bias, 0.0)

    def live_bias(self) -> Tensor | None:
        """The stored bias nearest to the learned one, 0 where pruned; gradients pass unchanged."""
        if self.bias is None:
            return None
        bias = self._masked(self.bias)
        if self.norm is not None:
            return bias
        with torch.no_grad():
            base, codes = stored_bias(bias, self.bias_base)
            moved = base * codes - bias
        return bias + moved if self.bias.requires_grad else base * codes

    def normed(self, y: Tensor) -> Tensor:
        """The layer's output with its norm."""
        assert self.norm is not None
        assert self.bias is not None
        live = None if self._all_live else self.live
        normed: Tensor = self.norm(y, self._masked(self.bias), live)
        return normed

    def stored(self) -> QuantizedLayer:
        """The layer as it is packed; its norm has to be folded."""
        if not isinstance(self.quantizer, LearnedStep):
            raise TypeError(
                f"layer {self.layer.name!r} is quantized by {type(self.quantizer).__name__}, which "
                f"does not say how its values are stored; quantize float_params() at its final "
                f"widths and train on from there"
            )
        out = self.quantizer.stored(self.real_weights().detach())
        if self.bias is None:
            return out
        with torch.no_grad():
            base, codes = stored_bias(self._masked(self.bias), self.bias_base)
        stored = StoredBias(np.float32(base.item()), codes.cpu().numpy().astype(np.int16))
        return replace(out, bias=stored)

    def start_norm(self, mean: Tensor, var: Tensor) -> None:
        """Set the new norm such that the layer computes what it did without.

        Args:
            mean: (out_channels,) mean output, bias included.
            var: (out_channels,) its variance.
        """
        assert self.norm is not None
        assert self.bias is not None
        with torch.no_grad():
            self.norm.start(mean - self._masked(self.bias), var)
            self.bias.copy_(mean)

    def fold(self) -> None:
        """Make the norm, with its running statistics, part of scales and bias; codes stay."""
        if self.norm is None:
            return
        assert self.bias is not None
        factor = self.norm.factor()
        with torch.no_grad():
            self.bias.sub_(factor * self.norm.mean)
            needed, _ = stored_bias(self._masked(self.bias), torch.zeros_like(self.bias_base))
            self.bias_base.copy_(needed)
        if isinstance(self.quantizer, LearnedStep):
            self.quantizer.absorb(factor)
        else:
            self.factor.mul_(factor[:, None])
        self.norm = None

    def _total_factor(self) -> Tensor:
        own = self.quantizer.factor if isinstance(self.quantizer, LearnedStep) else self.factor
        return own if self.norm is None else own * self.norm.factor()[:, None]

    def _masked(self, bias: Tensor) -> Tensor:
        return bias if self._all_live else torch.where(self.live, bias, 0.0)


def start_weights(layer: Layer, weight: Tensor, quantized: QuantizedLayer, inside: float) -> Tensor:
    """(out_channels, n) weights whose nearest levels are the stored codes.

    The float weight where its nearest level is the stored one; elsewhere the point nearest to it
    at most `inside` steps from that level. Rows of pruned channels stay as they are.
    """
    rows = (layer.out_channels, -1)
    grid = grid_of(layer, quantized)
    scale, low, high, offset = (
        x.reshape(rows) for x in (grid.scale, grid.low, grid.high, grid.offset)
    )
    codes = signed_codes(quantized)
    steps = weight.double() / scale - offset
    near = codes + (steps - codes).clamp(-inside, inside)
    nearest = torch.minimum(torch.maximum(steps.round(), low), high)
    margin = (steps - steps.round()).abs() <= 0.499  # float32 division must not cross the middle
    outside = (steps < low) | (steps > high)
    chosen = torch.where((nearest == codes) & (margin | outside), steps, near)
    live = torch.tensor(quantized.bit_widths)[:, None] > 0
    return torch.where(live, scale * (chosen + offset), weight.double()).float()


def _unit(weight: Tensor) -> Tensor:
    """(out_channels, 1) powers of two that bring rows to the size of He's initialization."""
    size = weight.double().square().mean(dim=1, keepdim=True).sqrt()
    wanted = (2 / weight.shape[1]) ** 0.5
    exponent = (size / wanted).clamp(2.0**-60, 2.0**60).log2().round()
    return torch.pow(2.0, exponent).float()
