from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_ops.errors import VerificationError
from quant_ops.requantize import WIDE_LIMIT, Codes, Rescale, wide_codes

BYTE = Codes(0.1, 3, 0, 255)


def one(ratio: float, bound: float, constant: float = 0.0, codes: Codes = BYTE) -> Rescale:
    return Rescale.fitted([np.array(ratio)], [np.array(bound)], np.array(constant), codes)


def by_hand(rescale: Rescale, *accumulators: int) -> int:
    """The stated rule in Python's unbounded integers."""
    total = int(rescale.offset)
    for accumulator, multiplier in zip(accumulators, rescale.multipliers, strict=True):
        total += accumulator * int(multiplier)
        assert -(2**63) <= total < 2**63
    code = (total >> int(rescale.shift)) + rescale.zero_point
    return min(max(code, rescale.low), rescale.high)


@pytest.mark.parametrize("ratio", [2.0**-9, 1 / 9, 0.0037, 1.0, 0.5, 3.7e-8, 1.9, 12.0])
def test_every_16_bit_accumulator_is_rescaled_as_unbounded_integers_would_be(ratio: float) -> None:
    rescale = one(ratio, 2**15, constant=-0.37)
    accumulators = np.arange(-(2**15), 2**15 + 1)
    expected = [by_hand(rescale, a) for a in accumulators.tolist()]
    np.testing.assert_array_equal(rescale(accumulators), expected)


@pytest.mark.parametrize("shift", range(1, 12))
def test_a_power_of_two_rounds_exact_halves_upwards(shift: int) -> None:
    rescale = one(2.0**-shift, 2**20, codes=Codes(1.0, 0, -WIDE_LIMIT, WIDE_LIMIT))
    for accumulator in range(-3 * 2**shift, 3 * 2**shift):
        exact = Fraction(accumulator, 2**shift) + Fraction(1, 2)
        assert int(rescale(np.array(accumulator))) == exact.numerator // exact.denominator


@given(
    ratio=st.floats(2.0**-40, 2.0**20),
    bound=st.integers(1, 2**31 - 1),
    constant=st.floats(-1e6, 1e6),
    share=st.floats(-1, 1),
)
def test_no_sum_within_the_bound_overflows_and_none_is_off_by_more_than_the_last_digit(
    ratio: float, bound: int, constant: float, share: float
) -> None:
    codes = Codes(1.0, 0, -(2**62), 2**62)
    rescale = one(ratio, bound, constant, codes)
    for accumulator in (-bound, bound, int(share * bound)):
        code = by_hand(rescale, accumulator)
        assert code == int(rescale(np.array(accumulator)))
        exact = Fraction(ratio) * accumulator + Fraction(constant)
        assert abs(code - exact) <= Fraction(1, 2) + abs(exact) / 2**29 + Fraction(1, 2**20) * max(
            1, abs(int(ratio * bound)) // 2**20
        )


@given(ratio=st.floats(2.0**-31, 2.0**15), bound=st.integers(1, 2**31 - 1))
def test_a_multiplier_without_a_constant_has_31_significant_bits(ratio: float, bound: int) -> None:
    (multiplier,) = one(ratio, bound).multipliers
    assert 2**30 - 1 <= int(multiplier) < 2**31


@given(
    ratios=st.lists(st.floats(-4, 4), min_size=2, max_size=3),
    values=st.lists(st.integers(-255, 255), min_size=3, max_size=3),
)
def test_a_residual_sum_is_rounded_once_on_one_shift(
    ratios: list[float], values: list[int]
) -> None:
    n = len(ratios)
    bounds = [np.array(255.0)] * n
    rescale = Rescale.fitted([np.array(r) for r in ratios], bounds, np.array(0.0), BYTE)
    accumulators = [np.array(v) for v in values[:n]]
    assert int(rescale(*accumulators)) == by_hand(rescale, *values[:n])
    exact = sum(Fraction(r) * v for r, v in zip(ratios, values, strict=False))
    wanted = min(max(exact + 3, Fraction(0)), Fraction(255))
    assert abs(int(rescale(*accumulators)) - wanted) <= Fraction(1, 2) + Fraction(1, 2**18)


def test_wide_accumulators_get_shorter_multipliers_instead_of_overflow() -> None:
    rescale = one(0.3, 2.0**40)
    assert by_hand(rescale, 2**40) == 255
    assert int(rescale.multipliers[0]) < 2**23


def test_a_pruned_channel_keeps_the_zero_point() -> None:
    assert int(one(0.0, 0.0)(np.array(0))) == BYTE.zero_point


def test_an_absurd_scale_is_refused() -> None:
    with pytest.raises(VerificationError, match="not a sound one"):
        one(1e300, 1e10, constant=1e300)


def test_quantization_of_floats_rounds_halves_to_even_and_saturates() -> None:
    codes = Codes(0.5, 1, 0, 7)
    x = np.array([-9.0, -0.25, 0.25, 0.75, 1.25, 2.9, 1e38, -np.inf], np.float32)
    np.testing.assert_array_equal(codes.quantize(x), [0, 1, 1, 3, 3, 7, 7, 0])
    np.testing.assert_array_equal(codes.dequantize(np.array([0, 1, 7])), [-0.5, 0.0, 3.0])


@given(st.floats(1e-30, 1e30))
def test_the_scale_of_an_output_is_the_power_of_two_that_just_holds_it(largest: float) -> None:
    codes = wide_codes(largest)
    assert np.log2(codes.scale) % 1 == 0
    assert WIDE_LIMIT / 2 * codes.scale < largest <= WIDE_LIMIT * codes.scale
