"""Cheap constants give the exact codes for every accumulator."""

import numpy as np
import pytest

from cost_models.fpga.rescaling import Fixed, cheapest


@pytest.mark.parametrize("seed", range(40))
def test_codes_stay_for_every_accumulator(seed):
    rng = np.random.default_rng(seed)
    bits, reach = int(rng.integers(1, 9)), int(rng.integers(1, 4000))
    low, high = (-int(rng.integers(0, reach + 1)), reach)
    least = -(2 ** (bits - 1)) if seed % 3 == 0 else 0
    multiplier, shift = int(rng.integers(2**30, 2**31)), int(rng.integers(28, 44))
    offset = int(rng.normal() * 2 ** (shift + bits - 2)) + 2 ** (shift - 1)
    exact = Fixed(multiplier, offset, shift, least, least + 2**bits - 1)
    cheap = cheapest(exact, low, high)
    accumulators = np.arange(low, high + 1)
    assert np.array_equal(cheap(accumulators), exact(accumulators))
    assert cheap.multiplier.bit_length() < multiplier.bit_length()


def test_a_power_of_two_needs_no_multiplier():
    exact = Fixed(2**30, 2**32 + 2**33, 34, 0, 255)
    assert cheapest(exact, -5000, 5000).multiplier == 1


def test_a_pruned_channel_is_a_constant():
    assert cheapest(Fixed(0, 5 << 20, 20, 0, 15), 0, 0) == Fixed(0, 5, 0, 0, 15)


def test_what_is_no_rescaling_is_refused():
    with pytest.raises(ValueError, match="no rescaling"):
        cheapest(Fixed(-1, 0, 0, 0, 15), 0, 1)
