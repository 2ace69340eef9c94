"""Layers whose multipliers are shared over time: DSPs, block memories, cycles. Not validated.

No tool of this project measures these; the counts follow from the devices' data sheets (a DSP48
multiplies 25 x 18 bits, a block memory of 18 kbit is at most 36 bits wide) and from one
multiplication per multiplier and cycle.
"""

import math
from dataclasses import dataclass

import numpy as np

from cost_models.fpga.adders import ADDERS_PER_STAGE, bits_between
from cost_models.fpga.circuit import Circuit

DSP_WEIGHT_BITS, DSP_INPUT_BITS = 25, 18
BRAM_WIDTH, BRAM_DEPTH = 36, 512


@dataclass(frozen=True, slots=True)
class Shared:
    """Analytic resources of one layer with shared multipliers.

    Attributes:
        multipliers: that work at the same time.
        dsp: DSP48 slices.
        bram: block memories of 18 kbit that hold the weights.
        cycles: from one input to all positions of the output.
    """

    multipliers: int
    dsp: int
    bram: int
    cycles: int


def shared(circuit: Circuit, reuse: int, positions: int = 1) -> Shared:
    """A layer whose every multiplier serves `reuse` weights in turn.

    Args:
        circuit: of one position; weights that are 0 are skipped.
        reuse: 1 is one multiplier per weight, all at once.
        positions: of a convolution, one after the other.

    Raises:
        ValueError: a reuse below 1.
    """
    if reuse < 1:
        raise ValueError(f"a multiplier serves at least one weight, got {reuse}")
    weights = circuit.weights
    present = int(np.count_nonzero(weights))
    n = math.ceil(present / reuse)
    low, high = int(weights.min(initial=0)), int(weights.max(initial=0))
    weight_bits = int(bits_between(np.array([low]), np.array([high]))[0])
    input_bits = int(bits_between(np.array([circuit.low]), np.array([circuit.high]))[0])
    per_product = math.ceil(weight_bits / DSP_WEIGHT_BITS) * math.ceil(input_bits / DSP_INPUT_BITS)
    deep = math.ceil(reuse / BRAM_DEPTH)
    bram = 0 if reuse == 1 else math.ceil(n * weight_bits / BRAM_WIDTH) * deep
    tree = math.ceil(math.log2(max(weights.shape[1], 1)) / ADDERS_PER_STAGE)
    return Shared(n, n * per_product, bram, reuse * positions + tree)
