"""Narrow multipliers: equal on every sum that can occur, and cheaper."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_ops.narrow import NarrowRescale, channel_of, csd_digits, narrowed
from quant_ops.requantize import Codes, Rescale


def rescale(ratios, constant, codes, bounds):
    fitted = Rescale.fitted(
        [np.array([r]) for r in ratios],
        [np.array(float(b)) for b in bounds],
        np.array([constant]),
        codes,
    )
    return channel_of(fitted, 0)


@settings(max_examples=150, deadline=None)
@given(
    ratio=st.floats(1e-4, 3.0),
    constant=st.floats(-20, 20),
    low=st.integers(-3000, 0),
    high=st.integers(1, 3000),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    zero_point=st.integers(0, 3),
)
def test_every_sum_keeps_its_code(ratio, constant, low, high, bits, signed, zero_point):
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = Codes(1.0, min(zero_point, most), least, most)
    exact = rescale([ratio], constant, codes, [max(-low, high)])
    narrow = narrowed(exact, (low, high))
    sums = np.arange(low, high + 1)
    np.testing.assert_array_equal(narrow(sums), exact(sums))
    assert csd_digits(narrow.multipliers[0]) <= csd_digits(exact.multipliers[0])


@settings(max_examples=40, deadline=None)
@given(
    first=st.floats(0.05, 2.0),
    second=st.floats(-2.0, -0.05) | st.floats(0.05, 2.0),
    constant=st.floats(-5, 5),
)
def test_every_pair_of_sums_keeps_its_code(first, second, constant):
    exact = rescale([first, second], constant, Codes(1.0, 0, 0, 255), [127, 127])
    narrow = narrowed(exact, (-128, 127), (-128, 127))
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    np.testing.assert_array_equal(narrow(a, b), exact(a, b))


@pytest.mark.parametrize("multiplier", [123_456_789, -123_456_789])
def test_a_wide_reach_is_checked_where_codes_change(multiplier):
    exact = NarrowRescale((multiplier,), 1 << 39, 40, 0, -128, 127)
    narrow = narrowed(exact, (-3_000_000, 3_000_000))
    sums = np.random.default_rng(0).integers(-3_000_000, 3_000_001, 200_000)
    np.testing.assert_array_equal(narrow(sums), exact(sums))
    assert narrow.shift < exact.shift


def test_a_power_of_two_becomes_a_shift():
    exact = rescale([0.125], 0.0, Codes(1.0, 0, 0, 15), [500])
    narrow = narrowed(exact, (-500, 500))
    assert (narrow.multipliers, narrow.shift) == ((1,), 3)


def test_signed_digits():
    for value in range(-600, 600):
        digits, rest = 0, abs(value)
        while rest:
            if rest % 2:
                digit = 2 - rest % 4
                rest -= digit
                digits += 1
            rest //= 2
        assert csd_digits(value) == digits
