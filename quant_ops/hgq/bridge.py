"""From trained HGQ layers to stored ones: the same numbers as codes, scales and biases.

A channel's weights are multiples of one power of two, its scale; their codes then fit a legal width
that is never above the widest weight's own. Nothing is rounded: what does not fit is refused.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bit_widths import LEVELS, TERNARY
from quant_ops.hgq.layers import HGQLayer
from quant_ops.hgq.quantizer import FixedPointQuantizer
from quant_ops.quantized import ActivationQuant, QuantizedLayer
from quant_ops.stored import BIAS_MAX, MAX_EXPONENT, StoredBias, StoredScale

_WIDTHS = (TERNARY, 2, 3, 4, 5, 6, 7, 8)  # mid-tread: 0 is a level
_HALF_TOP = 15  # the ratio byte of 1/2, the largest power of two that a byte can stand for


def quantized_layer(layer: HGQLayer, *, name: str = "layer") -> QuantizedLayer:
    """The stored form of a layer whose inference weight and bias it equals, value by value.

    A channel of width 0 loses its bias, as everywhere; move what the bias did to the consumers
    first.

    Args:
        layer: any granularity.
        name: for messages.

    Raises:
        ValueError: a channel needs more than 8 bits, or scales or biases more than is stored.
    """
    weight = layer.quantized_weight()
    return quantized_rows(weight.flatten(1), bias=_stored_bias(layer, name), name=name)


def quantized_rows(
    weight: Tensor, *, bias: StoredBias | None = None, name: str = "layer"
) -> QuantizedLayer:
    """The stored form of fixed-point weights (out, n), equal value by value.

    Raises:
        ValueError: a row needs more than 8 bits, or the scales of a width more octaves than are
            stored.
    """
    rows = weight.detach().double().cpu().numpy()
    exponents = _finest_exponents(rows)
    whole = np.rint(np.ldexp(rows, -exponents[:, None])).astype(np.int64)
    widths = [_narrowest(row, f"{name}, channel {i}") for i, row in enumerate(whole)]
    present = sorted({width for width in widths if width})
    scales = {}
    for width in present:
        of_width = exponents[[i for i, w in enumerate(widths) if w == width]]
        scales[width] = _stored_scale(of_width, f"{name} at {width:g} bits")
    return QuantizedLayer(
        bit_widths=tuple(widths),
        codes=whole.astype(np.int16),
        scales=scales,
        mid_rise=frozenset(),
        zero_points=None,
        bias=bias,
    )


def activation_quant(quantizer: FixedPointQuantizer, *, name: str = "edge") -> ActivationQuant:
    """The stored form of an activation's quantizer: equal on every input.

    Raises:
        ValueError: bits that differ within the tensor, another rounding or overflow than RND_CONV
            and SAT (the arithmetic of packed files), or a width outside 1 to 8.
    """
    modes = quantizer.arithmetic
    if quantizer.integer_bits.numel() != 1:
        raise ValueError(
            f"{name}: a packed file has one width per activation tensor, not bits of shape "
            f'{list(quantizer.shape)}; train it with granularity "tensor"'
        )
    if (modes.rounding, modes.overflow) != ("RND_CONV", "SAT"):
        raise ValueError(
            f"{name}: packed files round activations by RND_CONV and saturate by SAT, not "
            f"{modes.rounding} and {modes.overflow}; train it with those"
        )
    integer_bits, fraction_bits = (int(bits.item()) for bits in quantizer.whole_bits())
    signed = bool(quantizer.signed.item())
    width = integer_bits + fraction_bits + signed
    if not 1 <= width <= 8:
        raise ValueError(f"{name}: {width} bits, but an activation is stored with 1 to 8")
    return ActivationQuant(width, signed, float(2.0**-fraction_bits))


def _finest_exponents(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Per row the largest e such that every value is a multiple of 2^e; 0 for a row of zeros."""
    mantissa, exponent = np.frexp(np.abs(rows))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    trailing = np.log2(np.maximum(whole & -whole, 1).astype(np.float64)).astype(np.int64)
    finest = np.where(whole > 0, exponent - 53 + trailing, np.iinfo(np.int64).max)
    least: NDArray[np.int64] = finest.min(axis=1)
    return np.where((whole > 0).any(axis=1), least, 0)


def _narrowest(row: NDArray[np.int64], where: str) -> float:
    """The narrowest legal width that holds the codes of one channel."""
    if not row.any():
        return 0
    low, high = int(row.min()), int(row.max())
    for width in _WIDTHS:
        if low >= -(LEVELS[width] // 2) and high <= (LEVELS[width] - 1) // 2:
            return width
    raise ValueError(
        f"{where}: its weights share no scale at 8 bits or less (codes from {low} to {high}); "
        "lower the limits of its bits, or train with one width per channel"
    )


def _stored_scale(exponents: NDArray[np.int64], where: str) -> StoredScale:
    top = int(exponents.max())
    below = top - exponents
    if below.max(initial=0) > MAX_EXPONENT:
        raise ValueError(
            f"{where}: scales from 2^{exponents.min()} to 2^{top}, but a layer stores at most "
            f"{MAX_EXPONENT} octaves; narrow the limits of the integer bits"
        )
    ratio = (16 * below + _HALF_TOP).astype(np.uint8)
    return StoredScale(np.float32(2.0 ** (top + 1)), ratio[:, None])


def _stored_bias(layer: HGQLayer, name: str) -> StoredBias | None:
    bias = layer.quantized_bias()
    if bias is None:
        return None
    values = bias.detach().double().cpu().numpy()
    if layer.bias_quantizer is None:
        return StoredBias.nearest(values)
    (exponent,) = _finest_exponents(values[None])
    codes = np.rint(np.ldexp(values, -exponent))
    if np.abs(codes).max(initial=0) > BIAS_MAX:
        raise ValueError(
            f"{name}: its biases share no step at 16 bits; lower most_bits of the bias to 15"
        )
    return StoredBias(np.float32(2.0**exponent), codes.astype(np.int16))


def candidate_widths(layer: HGQLayer) -> tuple[float, ...]:
    """Declared storage width of each channel, sign included: what its weights may come to need.

    Integers >= 0, possibly above 8; `quantized_layer` may get by with fewer.
    """
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        bits = quantizer.magnitude_bits()
        stored = torch.where(bits > 0, bits + quantizer.signed, 0.0)
    shape = (layer.weight.shape[0], *stored.shape[1:])
    widest = stored.expand(shape).reshape(shape[0], -1).amax(dim=1)
    return tuple(float(width) for width in widest)
