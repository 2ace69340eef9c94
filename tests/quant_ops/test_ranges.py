"""Optimal steps of known distributions, and properties of every range setter."""

import numpy as np
import pytest
import scipy.stats
import torch

from quant_ops.calibration import (
    ACTIVATION_SETTERS,
    HISTOGRAM_BINS,
    EdgeRange,
    choose_activation_quant,
)
from quant_ops.quantizers import Levels, fake_quantize, levels_of, squared_errors
from quant_ops.ranges import RANGE_SETTERS, mse_scale, weight_scales, zero_points

N = 200_000
SHAPES = {"gauss": scipy.stats.norm, "laplace": scipy.stats.laplace(scale=2**-0.5)}

# Minimum mean square error uniform quantizers [Max1960]: step in standard deviations, SQNR in dB.
MID_RISE = {
    "gauss": {
        2: (0.996, 9.25), 3: (0.586, 14.27), 4: (0.335, 19.38), 5: (0.188, 24.57),
        6: (0.104, 29.84), 7: (0.0568, 35.19), 8: (0.0308, 40.64),
    },
    "laplace": {
        2: (1.087, 7.07), 3: (0.731, 11.44), 4: (0.461, 15.97), 5: (0.280, 20.61),
        6: (0.166, 25.39), 7: (0.096, 30.31),
    },
}  # fmt: skip
TWOS_COMPLEMENT_CLIP = {2: 2.097, 3: 2.407, 4: 2.709, 5: 3.020, 6: 3.333, 7: 3.639, 8: 3.931}
RELU_STEP = {2: 0.651, 3: 0.353, 4: 0.193, 5: 0.106, 6: 0.057, 7: 0.031}


def stratified(shape):
    """The quantiles of a distribution: a sample without sampling noise."""
    return torch.from_numpy(SHAPES[shape].ppf((np.arange(N) + 0.5) / N)).float()[None]


CASES = [(shape, b, *row) for shape, rows in MID_RISE.items() for b, row in rows.items()]


@pytest.mark.parametrize(("shape", "bit_width", "step", "sqnr"), CASES)
def test_least_squares_finds_the_published_optimum(shape, bit_width, step, sqnr):
    rows = stratified(shape)
    levels = levels_of(bit_width, "mid_rise")
    wanted = mse_scale(rows, levels)
    assert float(wanted) == pytest.approx(step, rel=0.025)
    stored = weight_scales(rows, bit_width, levels)
    assert float(stored.values[0]) == pytest.approx(step, rel=0.035)
    for scale in (wanted.float(), torch.from_numpy(stored.values)):
        error = squared_errors(rows, scale[None], levels)
        found = 10 * np.log10(float(rows.double().square().sum() / error))
        assert found == pytest.approx(sqnr, abs=0.06)


@pytest.mark.parametrize(("bit_width", "clip"), TWOS_COMPLEMENT_CLIP.items())
def test_twos_complement_clips_where_theory_says(bit_width, clip):
    wanted = mse_scale(stratified("gauss"), levels_of(bit_width, "mid_tread"))
    assert float(wanted) * 2 ** (bit_width - 1) == pytest.approx(clip, rel=0.025)


def test_ternary_step_is_the_gaussian_optimum():
    wanted = mse_scale(stratified("gauss"), levels_of(1.6, "mid_tread"))
    assert float(wanted) == pytest.approx(1.224, rel=0.025)


def test_closed_form_ternary_is_close_to_the_optimum():
    rows, levels = stratified("gauss"), levels_of(1.6, "mid_tread")
    best, closed = (
        float(squared_errors(rows, RANGE_SETTERS[name](rows, levels, None).float()[None], levels))
        for name in ("mse", "twn")
    )
    assert best <= closed <= 1.01 * best


@pytest.mark.parametrize("scheme", ["mid_tread", "mid_rise", "auto"])
def test_binary_levels_are_plus_and_minus_mean_magnitude(scheme):
    rows = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    for setter in RANGE_SETTERS:
        scale = weight_scales(rows, 1, levels_of(1, scheme), setter).values
        np.testing.assert_allclose(scale / 2, rows.abs().mean(dim=1), rtol=0.033)
        exact = 2 * rows[0].abs().mean()
        around = exact * torch.linspace(0.8, 1.2, 41)[:, None]
        errors = squared_errors(rows[:1], around, levels_of(1, scheme))
        assert float(around[errors.argmin()]) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("bit_width", [1.6, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("scheme", ["mid_tread", "mid_rise", "affine"])
def test_grid_search_is_as_good_as_an_exhaustive_one(bit_width, scheme):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(40, 64, generator=generator) ** 3 + 0.2
    zero = zero_points(rows, bit_width) if scheme == "affine" else None
    levels = levels_of(bit_width, scheme, zero)
    found = squared_errors(rows, mse_scale(rows, levels)[None].float(), levels)[0]
    largest = RANGE_SETTERS["minmax"](rows, levels, None)
    every = largest * torch.linspace(0.02, 1, 400, dtype=torch.float64)[:, None]
    best = squared_errors(rows, every.float(), levels).amin(dim=0)
    assert float(found.sum()) <= 1.02 * float(best.sum())


@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["mid_tread", "mid_rise", "affine"])
def test_minmax_clips_nothing(bit_width, scheme):
    rows = torch.randn(20, 30, generator=torch.Generator().manual_seed(3)) + 0.3
    zero = zero_points(rows, bit_width) if scheme == "affine" else None
    scale = RANGE_SETTERS["minmax"](rows, levels_of(bit_width, scheme, zero), None).float()
    error = (fake_quantize(rows, scale[:, None], bit_width, scheme, zero) - rows).abs()
    limit = 0.5 if scheme != "affine" else 1.0  # the zero point is rounded
    assert bool((error <= limit * scale[:, None] * 1.0001).all())


def test_percentile_clips_the_outlier():
    row = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([50.0])])[None]
    scale = RANGE_SETTERS["percentile"](row, levels_of(8, "mid_tread"), None)
    assert float(scale) * 127 == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("setter", RANGE_SETTERS)
@pytest.mark.parametrize("bit_width", [1, 1.6, 2, 8])
def test_powers_of_two_pass_through_and_zeros_are_harmless(setter, bit_width):
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
    rows[2] = 0
    levels = levels_of(bit_width, "mid_tread")
    one, other = (weight_scales(k * rows, bit_width, levels, setter) for k in (1.0, 2.0**-30))
    assert np.array_equal(one.ratio, other.ratio)
    assert one.base == np.float32(2.0**30) * other.base
    assert one.ratio[2] == 255


def relu_edge():
    values = np.maximum(SHAPES["gauss"].ppf((np.arange(N) + 0.5) / N), 0)
    histogram, _ = np.histogram(values, HISTOGRAM_BINS, (-8, 8))
    counts = torch.from_numpy(histogram.astype(np.float64))
    return EdgeRange(0.0, float(values.max()), float(values.mean()), 8.0, counts)


@pytest.mark.parametrize(("bit_width", "step"), RELU_STEP.items())
def test_rectified_gaussian_edges_get_the_published_step(bit_width, step):
    chosen = choose_activation_quant(relu_edge(), bit_width, "mse")
    assert (chosen.signed, chosen.zero_point) == (False, 0)
    assert chosen.scale == pytest.approx(step, rel=0.035)


def test_eight_bit_edges_keep_the_whole_range():
    edge = relu_edge()
    chosen = choose_activation_quant(edge, 8)
    assert chosen.scale == pytest.approx(edge.maximum / 255, rel=1e-6)
    assert np.float32(chosen.scale) == chosen.scale


@pytest.mark.parametrize("setter", ACTIVATION_SETTERS)
@pytest.mark.parametrize("bit_width", [2, 4, 8])
def test_signed_edges_hold_zero_exactly(setter, bit_width):
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
    counts[HISTOGRAM_BINS // 2 - 300 : HISTOGRAM_BINS // 2 + 1500] = 1
    limit = 4.0
    width = 2 * limit / HISTOGRAM_BINS
    edge = EdgeRange(-300 * width, 1500 * width, 600 * width, limit, counts)
    chosen = choose_activation_quant(edge, bit_width, setter)
    low, high = chosen.code_range
    assert chosen.signed
    assert low <= chosen.zero_point <= high
    assert float(chosen.fake_quantize(torch.zeros(1))) == 0
    if setter == "minmax":
        ends = torch.tensor([edge.minimum, edge.maximum])
        assert bool(((chosen.fake_quantize(ends) - ends).abs() <= 1.01 * chosen.scale).all())


def test_a_constant_edge_gets_some_quantizer():
    edge = EdgeRange(0.0, 0.0, 0.0, 1.0, torch.zeros(HISTOGRAM_BINS, dtype=torch.float64))
    assert choose_activation_quant(edge, 4).scale > 0


def test_unknown_setters_are_named():
    with pytest.raises(ValueError, match="'median'"):
        weight_scales(torch.ones(1, 2), 4, Levels(-8, 7, 0.0), "median")
    with pytest.raises(ValueError, match="'median'"):
        choose_activation_quant(relu_edge(), 4, "median")
