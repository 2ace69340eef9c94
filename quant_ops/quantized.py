"""A network with a candidate applied to it: codes, stored scales, stored biases."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bit_widths import LEVELS
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph, Layer
from quant_ops.layout import from_canonical
from quant_ops.stored import StoredBias, StoredScale


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """One layer's stored integers. Canonical form, output channels first.

    value = scale * (code + 1/2) for widths in `mid_rise`, scale * (code - zero_point) otherwise;
    0 for a channel of width 0, its bias included.

    Attributes:
        bit_widths: one per output channel.
        codes: (out_channels, weights_per_channel); rows of pruned channels are 0. Signed, except
            affine codes, which run from 0 to 2^b - 1.
        scales: for each width present but 0, the stored scales of all its channels,
            (channels of that width, groups), in channel order.
        mid_rise: the widths whose levels are offset by half a step.
        zero_points: (out_channels, groups) for the affine scheme, else None.
        bias: (out_channels,), or None for an embedding.
    """

    bit_widths: tuple[float, ...]
    codes: NDArray[np.int16]
    scales: Mapping[float, StoredScale]
    mid_rise: frozenset[float]
    zero_points: NDArray[np.int16] | None
    bias: StoredBias | None

    def channel_scales(self) -> NDArray[np.float32]:
        """(out_channels, groups); 0 for pruned channels."""
        groups = next((s.ratio.shape[1] for s in self.scales.values()), 1)
        out = np.zeros((len(self.bit_widths), groups), np.float32)
        widths = np.asarray(self.bit_widths)
        for width, stored in self.scales.items():
            out[widths == width] = stored.values
        return out

    def content(self) -> bytes:
        """Everything that is stored; equal layers give equal bytes."""
        parts = [repr((self.bit_widths, sorted(self.mid_rise))).encode(), self.codes.tobytes()]
        for width in sorted(self.scales):
            stored = self.scales[width]
            parts += [np.float32(stored.base).tobytes(), stored.ratio.tobytes()]
        if self.zero_points is not None:
            parts.append(self.zero_points.tobytes())
        if self.bias is not None:
            parts.append(self.bias.values.tobytes())
        return b"".join(parts)

    def doubled_codes(self) -> NDArray[np.int32]:
        """Twice the integer that a code stands for: 2 code + 1 (mid-rise) or 2 (code - zero)."""
        groups = 1 if self.zero_points is None else self.zero_points.shape[1]
        grouped = self.codes.astype(np.int32).reshape(len(self.bit_widths), groups, -1)
        if self.zero_points is not None:
            grouped -= self.zero_points[:, :, None]
        codes: NDArray[np.int32] = 2 * grouped.reshape(self.codes.shape)
        widths = np.asarray(self.bit_widths)
        codes[np.isin(widths, list(self.mid_rise))] += 1
        codes[widths == 0] = 0
        return codes

    def weight(self, layer: Layer) -> Tensor:
        """The float32 weight tensor that the codes stand for, in the operator's own layout."""
        scales = self.channel_scales() * np.float32(0.5)
        codes = self.doubled_codes().astype(np.float32)
        grouped = codes.reshape(*scales.shape, -1) * scales[:, :, None]
        kernel = layer.weight_shape[2:]
        canonical = torch.from_numpy(grouped.reshape(layer.out_channels, -1, *kernel))
        return from_canonical(layer, canonical).contiguous()

    def bias_values(self) -> Tensor | None:
        """The float32 bias (out_channels,), 0 where the channel is pruned."""
        if self.bias is None:
            return None
        values = self.bias.values.copy()
        values[np.asarray(self.bit_widths) == 0] = 0
        return torch.from_numpy(values)


def code_range(bit_width: float, scheme: str) -> tuple[int, int]:
    """Smallest and largest code.

    >>> code_range(3, "mid_tread"), code_range(1.6, "mid_tread"), code_range(1, "mid_rise")
    ((-4, 3), (-1, 1), (-1, 0))
    >>> code_range(4, "affine")
    (0, 15)
    """
    levels = LEVELS[bit_width]
    if scheme == "affine":
        return 0, levels - 1
    return -(levels // 2), (levels - 1) // 2


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """Per-tensor quantization of one edge: x = scale * (code - zero_point).

    Codes run from 0 to 2^b - 1 (unsigned) or -2^(b-1) to 2^(b-1) - 1 (signed).
    """

    bit_width: int
    signed: bool
    scale: float  # a float32 value
    zero_point: int = 0

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.signed:
            return -(2 ** (self.bit_width - 1)), 2 ** (self.bit_width - 1) - 1
        return 0, 2**self.bit_width - 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Nearest representable values, halves to even; gradients pass inside the range."""
        low, high = self.code_range
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """Everything a packed file holds, before packing or after reading.

    Attributes:
        graph: the folded network.
        candidate: the widths.
        layers: layer name to codes, for each layer of the candidate.
        activations: edge name to its quantizer.
        float_params: parameters that stay float, by name.
    """

    graph: Graph
    candidate: Candidate
    layers: Mapping[str, QuantizedLayer]
    activations: Mapping[str, ActivationQuant]
    float_params: Mapping[str, Tensor]

    def params(self) -> dict[str, Tensor]:
        """Parameter name to float32 tensor: what an `Executor` needs to run the graph."""
        out = dict(self.float_params)
        for name, quantized in self.layers.items():
            layer = self.graph.layer_of[name]
            out[layer.weight] = quantized.weight(layer)
            bias = quantized.bias_values()
            if layer.bias is not None and bias is not None:
                out[layer.bias] = bias
        return out
