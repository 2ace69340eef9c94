"""Steps without weights: sums of tensors, joined tensors, maxima, ReLU on its own."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.fpga.circuit import Features, of_quantizers
from cost_models.fpga.quantizer import Operand, bits, crossed, quantizer
from quant_ops.graph import Shape
from quant_ops.narrow import channel_of, narrowed
from quant_ops.program import Move
from quant_ops.requantize import Codes, Rescale

_COMPARES = ("max_pool", "adaptive_max_pool")
_ADDERS_PER_MAXIMUM = 2  # in a row: a difference, and the choice that its sign makes


def rescaled_sum(rescale: Rescale, sources: Sequence[Codes], n_elements: int) -> Features:
    """Tensors added (or one alone), each with a multiplier, at every element of the result.

    The constants are the shortest that give every code, as in an exported circuit. Sources are
    registered once as they come in.
    """
    reaches = [(c.low - c.zero_point, c.high - c.zero_point) for c in sources]
    operands = [Operand(low, high, 0) for low, high in reaches]
    n_constants = rescale.offset.size
    parts = []
    for channel in range(n_constants):
        exact = channel_of(rescale, channel)
        low, high = exact.low - exact.zero_point, exact.high - exact.zero_point
        found = narrowed(replace(exact, zero_point=0, low=low, high=high), *reaches)
        parts.append(quantizer(found, operands))
    one = of_quantizers(parts).times(n_elements // n_constants)
    return replace(one, input_bits=float(n_elements * sum(bits(*reach) for reach in reaches)))


def moved(step: Move, source: Codes, source_shape: Shape, shape: Shape) -> Features | None:
    """Maxima and ReLU; None for what only moves codes, which is wires."""
    width, n = (
        bits(source.low - source.zero_point, source.high - source.zero_point),
        math.prod(shape),
    )
    if step.op.startswith(_COMPARES):
        return _maxima(_window(step, source_shape, shape), n, width, math.prod(source_shape))
    if step.op.startswith("relu") and source.low < source.zero_point:
        left = bits(0, source.high - source.zero_point)
        return Features(clamp_bits=float(n * left), end_bits=float(n * left))
    return None


def _maxima(window: int, n: int, width: int, n_inputs: int) -> Features:
    """`n` maxima of `window` codes each, in pairs, then pairs of pairs."""
    levels, values, registers = 0, window, 0
    while values > 1:
        levels, values = levels + 1, math.ceil(values / 2)
        depth = _ADDERS_PER_MAXIMUM * levels
        registers += values * crossed(depth, depth + 1) if values > 1 else 0
    n_maxima = n * max(window - 1, 0)
    return Features(
        adder_bits=float(n_maxima * width),
        clamp_bits=float(n_maxima * width),
        input_bits=float(n_inputs * width),
        register_bits=float(n * registers * width),
        end_bits=float(n * width),
        depth=_ADDERS_PER_MAXIMUM * levels,
    )


def _window(step: Move, source_shape: Shape, shape: Shape) -> int:
    """Codes that one maximum is the largest of."""
    if step.op.startswith("max_pool"):
        n_axes = int(step.op.removeprefix("max_pool")[0])
        kernel = step.args[1]
        sizes = kernel if isinstance(kernel, tuple) else (kernel,)
        whole = np.broadcast_to(np.array(sizes, np.int64), n_axes)
        return int(whole.prod())
    return math.ceil(math.prod(source_shape) / max(math.prod(shape), 1))
