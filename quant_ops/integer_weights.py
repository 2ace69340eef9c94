"""Stored codes as the integers that enter accumulators, and how large those can become."""

import numpy as np
from numpy.typing import NDArray

from quant_ops.program import WeightCodes
from quant_ops.quantized import QuantizedLayer
from quant_ops.requantize import Codes

INT32_MAX = 2**31 - 1


def integer_weights(layer: QuantizedLayer) -> tuple[WeightCodes, NDArray[np.float64]]:
    """Integers (out_channels, weights_per_channel) and their scales (out_channels,).

    weight = scale * integer. Mid-rise channels hold 2 code + 1 at half the stored scale, the
    others code - zero_point; pruned channels 0 at scale 0.
    """
    doubled = layer.doubled_codes()
    is_mid_rise = np.isin(np.asarray(layer.bit_widths), list(layer.mid_rise))
    weights = np.where(is_mid_rise[:, None], doubled, doubled // 2).astype(np.int16)
    scales = layer.channel_scales()[:, 0].astype(np.float64)
    return weights, np.where(is_mid_rise, scales / 2, scales)


def accumulator_bound(weights: WeightCodes, source: Codes) -> int:
    """Largest magnitude of any partial sum of any output channel, summed in any order."""
    low, high = source.reach
    wide = weights.reshape(weights.shape[0], -1).astype(np.int64)
    positive, negative = np.maximum(wide, 0).sum(1), np.maximum(-wide, 0).sum(1)
    upward = positive * high - negative * low
    downward = negative * high - positive * low
    return int(max(upward.max(initial=0), downward.max(initial=0)))


def accumulator_bits(bound: int) -> int:
    """32 where sums of at most `bound` cannot overflow int32, else 64."""
    return 32 if bound <= INT32_MAX else 64
