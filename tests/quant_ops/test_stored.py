import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant_ops.stored import BIAS_MAX, StoredBias, StoredScale, ratio_values

positive = arrays(np.float64, st.integers(1, 20), elements=st.floats(1e-3, 1.0))


def test_the_256_ratios_fall_from_31_32nds_by_sixteen_steps_an_octave():
    ratios = ratio_values().astype(np.float64)
    assert ratios[0] == 31 / 32
    assert ratios[15] == 0.5
    assert ratios[16] == 31 / 64
    assert ratios[255] == 0.5 * 2.0**-15
    assert (np.diff(ratios) < 0).all()
    assert all(f"{r:.30f}" == f"{np.float32(r):.30f}" for r in ratios)


@given(positive)
def test_a_stored_scale_is_the_nearest_in_ratio(wanted):
    stored = StoredScale.nearest(wanted)
    grid = ratio_values().astype(np.float64) * float(stored.base)
    nearest = np.abs(np.log2(grid[None] / wanted[:, None])).min(axis=1)
    found = np.abs(np.log2(stored.values.astype(np.float64) / wanted))
    np.testing.assert_allclose(found, nearest, atol=1e-6)
    assert found.max() <= np.log2(1 + 1 / 31) + 1e-6
    assert stored.values.dtype == np.float32


@given(positive)
def test_the_largest_scale_is_stored_exactly_up_to_its_base(wanted):
    stored = StoredScale.nearest(wanted)
    assert stored.values.max() == pytest.approx(wanted.max(), rel=3e-7)


def test_zeros_and_scales_below_the_smallest_become_the_smallest():
    stored = StoredScale.nearest(np.array([[1.0, 0.0], [1e-9, 0.5]]))
    assert stored.ratio.tolist()[0][1] == stored.ratio.tolist()[1][0] == 255
    assert (stored.values > 0).all()
    assert (StoredScale.nearest(np.zeros(3)).values > 0).all()


def test_scales_far_below_float16_are_kept():
    tiny = np.array([3e-9, 2e-9])
    np.testing.assert_allclose(StoredScale.nearest(tiny).values, tiny, rtol=0.033)


@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(-10, 10)))
def test_a_stored_bias_is_within_half_a_step(wanted):
    stored = StoredBias.nearest(wanted)
    step = float(stored.base)
    assert np.abs(stored.codes).max() <= BIAS_MAX
    if np.abs(wanted).max() > 1e-30:
        # the base is rounded to float32: a code of 32767 moves by as many half roundings
        assert np.abs(stored.values - wanted).max() <= step * (0.5 + 0.01)
        assert np.abs(stored.codes).max() == BIAS_MAX


def test_no_bias_at_all_is_stored_as_zeros():
    stored = StoredBias.nearest(np.zeros(3))
    assert stored.values.tolist() == [0, 0, 0]
    assert stored.base == 1
