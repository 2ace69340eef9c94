"""A layer at one width throughout, and layers put together from rows of several such."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import LayerQuant
from quant_ops.graph import Layer
from quant_ops.quantized import QuantizedLayer
from quant_ops.stored import StoredScale


@dataclass(frozen=True, eq=False)
class UniformRows:
    """A whole layer at one width. Shapes as in QuantizedLayer, all channels present."""

    codes: NDArray[np.int16]
    scale: StoredScale
    zero_points: NDArray[np.int16] | None
    mid_rise: bool

    @property
    def size_bytes(self) -> int:
        """Of what the cache holds."""
        return self.codes.nbytes + self.scale.ratio.nbytes


def assembled(
    layer: Layer, quant: LayerQuant, uniform: Mapping[float, UniformRows]
) -> QuantizedLayer:
    """Each channel's row from the layer that is at its width throughout; no bias."""
    if quant.uniform:  # a layer of one width shares the cached arrays
        rows = uniform[quant.uniform]
        return QuantizedLayer(
            (quant.uniform,) * layer.out_channels,
            rows.codes,
            {quant.uniform: rows.scale},
            frozenset({quant.uniform} if rows.mid_rise else ()),
            rows.zero_points,
            None,
        )
    bit_widths = quant.per_channel(layer.out_channels)
    widths = np.asarray(bit_widths)
    codes = np.zeros((layer.out_channels, layer.weights_per_channel), np.int16)
    zeros: NDArray[np.int16] | None = None
    if quant.scheme == "affine":
        n_groups = layer.weights_per_channel // (quant.group_size or layer.weights_per_channel)
        zeros = np.zeros((layer.out_channels, max(1, n_groups)), np.int16)
    for width, whole in uniform.items():
        rows_here = widths == width
        codes[rows_here] = whole.codes[rows_here]
        if zeros is not None and whole.zero_points is not None:
            zeros[rows_here] = whole.zero_points[rows_here]
    scales = {w: StoredScale(u.scale.base, u.scale.ratio[widths == w]) for w, u in uniform.items()}
    mid_rise = frozenset(w for w, u in uniform.items() if u.mid_rise)
    return QuantizedLayer(bit_widths, codes, scales, mid_rise, zeros, None)
