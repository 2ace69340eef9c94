"""Clip limits from moments against the published tables and against the search for the best."""

import numpy as np
import pytest
import scipy.stats
import torch

from quant_ops.analytic_ranges import aciq_scale, gauss_clip, laplace_clip, sawb_knows, sawb_scale
from quant_ops.calibration import HISTOGRAM_BINS, EdgeRange, choose_activation_quant
from quant_ops.quantizers import Levels, levels_of, squared_errors
from quant_ops.ranges import mse_scale, weight_scales

N = 100_000
SHAPES = {"gauss": scipy.stats.norm, "laplace": scipy.stats.laplace(scale=2**-0.5)}
# bits 2 to 8, in units of E|x| and of the standard deviation [Banner2019]
LAPLACE = (2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897)
GAUSS = (1.711, 2.152, 2.559, 2.936, 3.287, 3.615, 3.924)


def stratified(shape):
    return torch.from_numpy(SHAPES[shape].ppf((np.arange(N) + 0.5) / N))[None]


@pytest.mark.parametrize(("at", "bit_width"), list(enumerate(range(2, 9))))
def test_clips_are_the_published_ones(at, bit_width):
    assert laplace_clip(2**bit_width) == pytest.approx(LAPLACE[at], abs=2e-3)
    assert gauss_clip(2**bit_width) == pytest.approx(GAUSS[at], abs=2e-3)


@pytest.mark.parametrize("bit_width", [3, 4, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_recognised(shape, bit_width):
    rows = stratified(shape)
    levels = levels_of(bit_width, "mid_rise")
    known = GAUSS if shape == "gauss" else LAPLACE
    unit = float(rows.square().mean().sqrt() if shape == "gauss" else rows.abs().mean())
    step = 2 * known[bit_width - 2] * unit / 2**bit_width
    assert float(aciq_scale(rows, levels)) == pytest.approx(step, rel=5e-3)


@pytest.mark.parametrize("setter", [aciq_scale, sawb_scale])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_near_the_least_possible(setter, shape):
    rows, levels = stratified(shape), levels_of(4, "mid_rise")
    errors = [
        float(squared_errors(rows.float(), s.float()[None], levels))
        for s in (setter(rows, levels), mse_scale(rows.float(), levels))
    ]
    assert errors[0] < 1.15 * errors[1]


def test_two_bit_statistics_give_the_published_gaussian_clip():
    # c1 + c2 * sqrt(2 / pi) = 1.473 standard deviations; the least error has 1.494
    wanted = sawb_scale(stratified("gauss"), levels_of(2, "mid_rise"))
    assert float(wanted) * 1.5 == pytest.approx(3.12 - 2.064 * np.sqrt(2 / np.pi), rel=1e-3)


def test_where_no_constants_are_known_the_least_squared_error_stands_in():
    rows = stratified("gauss").float()
    for bit_width in (5, 8):
        levels = levels_of(bit_width, "mid_tread")
        assert not sawb_knows(levels)
        plain, analytic = (weight_scales(rows, bit_width, levels, s) for s in ("mse", "sawb"))
        assert np.array_equal(plain.values, analytic.values)
    with pytest.raises(ValueError, match="3, 4, 7, 8, 15 and 16"):
        sawb_scale(rows, Levels(0, 15, 0.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_rectified_values_are_half_a_distribution_with_twice_the_levels(shape):
    values = np.maximum(SHAPES[shape].ppf((np.arange(N) + 0.5) / N), 0)
    counts, _ = np.histogram(values, HISTOGRAM_BINS, (-16, 16))
    edge = EdgeRange(
        0.0, float(values.max()), float(values.mean()), 16.0, torch.from_numpy(counts).double()
    )
    chosen = choose_activation_quant(edge, 4, "aciq")
    known = GAUSS[3] if shape == "gauss" else LAPLACE[3] * float(np.sqrt(0.5))
    assert chosen.scale * 16 == pytest.approx(known, rel=0.03)


def test_no_clip_lies_beyond_the_data():
    rows = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert float(aciq_scale(rows, levels_of(8, "mid_rise"))) == pytest.approx(2 / 256)
    assert float(sawb_scale(rows, levels_of(4, "mid_rise"))) == pytest.approx(2 / 15)
