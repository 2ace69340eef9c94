"""Analytic counts of shared multipliers against counts by hand."""

import numpy as np
import pytest

from cost_models.fpga.circuit import Circuit
from cost_models.fpga.reuse import Shared, shared

WEIGHTS = np.array([[7, -8, 0, 1], [0, 3, 2, -1]])  # 6 of 8 are there, 4 bits wide


def test_multipliers_memories_and_cycles_follow_from_the_reuse():
    circuit = Circuit(WEIGHTS, 0, 255)
    assert shared(circuit, 1) == Shared(6, 6, 0, 2)
    assert shared(circuit, 3) == Shared(2, 2, 1, 4)
    assert shared(circuit, 4, positions=9) == Shared(2, 2, 1, 37)
    assert shared(circuit, 600) == Shared(1, 1, 2, 601)


def test_a_multiplier_serves_at_least_one_weight():
    with pytest.raises(ValueError, match="at least one weight"):
        shared(Circuit(WEIGHTS, 0, 255), 0)
