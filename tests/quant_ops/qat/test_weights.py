"""Learned steps: the published gradients, levels of every width, and what is stored."""

import math

import numpy as np
import pytest
import torch

from quant_ops.qat.weights import RULES, LearnedStep
from quant_ops.quantizers import fake_quantize


def made(bit_widths, *, rule="lsq", seed=0, n=24):
    torch.manual_seed(seed)
    weights = torch.randn(len(bit_widths), n)
    return weights, LearnedStep.from_weights(weights, bit_widths, rule=rule)


@pytest.mark.parametrize("bit_width", [1.6, 2, 3, 4, 8])
def test_gradients_are_those_of_the_paper(bit_width):
    weights, quantizer = made((bit_width,))
    weights.requires_grad_()
    upstream = torch.randn_like(weights)
    (quantizer(weights) * upstream).sum().backward()
    step = float(quantizer.log_step.detach().exp())
    low, high = float(quantizer.low), float(quantizer.high)
    at = weights.detach() / step
    inside = (at >= low) & (at <= high)
    assert torch.allclose(weights.grad, upstream * inside, rtol=0.04)  # the scale is a stored one
    slope = torch.where(inside, at.round() - at, at.clamp(low, high))
    factor = 1 / math.sqrt(weights.shape[1] * max(high, -low))
    wanted = (upstream * slope).sum() * factor / step  # of the logarithm: relative change
    scale = float(quantizer.grid(quantizer.log_step.detach().exp()))
    assert float(quantizer.log_step.grad) == pytest.approx(float(wanted) * scale / step, rel=1e-4)


def test_a_step_of_descent_changes_the_step_as_in_the_paper():
    weights, quantizer = made((3,))
    quantizer.on_grid = False
    before = float(quantizer.log_step.detach().exp())
    (quantizer(weights) - weights).square().sum().backward()
    at = weights / before
    inside = (at >= -4) & (at <= 3)
    slope = torch.where(inside, at.round() - at, at.clamp(-4, 3))
    error = 2 * (at.clamp(-4, 3).round() * before - weights)
    by_step = float((error * slope).sum()) / math.sqrt(weights.shape[1] * 4)
    torch.optim.SGD(quantizer.parameters(), lr=1e-5).step()
    moved = float(quantizer.log_step.detach().exp()) - before
    assert moved == pytest.approx(-1e-5 * by_step, rel=0.02)


def test_every_width_gives_its_nearest_levels_and_pruned_rows_are_zero():
    widths = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)
    weights, quantizer = made(widths)
    values = quantizer(weights).detach()
    stored = quantizer.stored(weights)
    scales = stored.channel_scales()
    assert not values[0].any()
    for row, width in enumerate(widths[1:], start=1):
        wanted = fake_quantize(weights[row], torch.tensor(scales[row]), width, "mid_tread")
        off = (values[row] - wanted).abs() > 0
        # codes are taken with the learned step, values with the stored one: nearest to either
        assert off.float().mean() <= 0.3
        assert len(values[row].unique()) <= max(2, round(2**width) + (width == 1.6))
    doubled = torch.from_numpy(stored.doubled_codes()).float() * (torch.from_numpy(scales) / 2)
    assert torch.equal(doubled, values)


def test_binary_weights_keep_a_gradient_up_to_twice_their_level():
    weights, quantizer = made((1,))
    step = float(quantizer.log_step.detach().exp())
    at = torch.tensor([[0.1, 0.9, 1.1, -0.9, -1.1]]) * step
    at.requires_grad_()
    LearnedStep.from_weights(weights, (1,))(at).sum().backward()
    assert (at.grad != 0).tolist() == [[True, True, False, True, False]]


def test_the_start_without_scales_is_that_of_the_paper():
    weights, quantizer = made((4, 2))
    top = torch.tensor([[7.0], [1.0]])
    wanted = 2 * weights.abs().mean(dim=1, keepdim=True) / top.sqrt()
    assert torch.allclose(quantizer.log_step.exp(), wanted, rtol=0.04)


@pytest.mark.parametrize("rule", RULES[1:])
def test_rules_set_what_they_cover_and_leave_the_rest_learned(rule):
    weights, quantizer = made((1.6, 8), rule=rule, n=200)
    weights.requires_grad_()
    values = quantizer(weights)
    (values - 1.1).square().sum().backward()
    by_step = quantizer.log_step.grad[:, 0]
    assert float(by_step[1]) != 0
    assert (float(by_step[0]) != 0) == (rule == "ttq")
    assert values[0].detach().unique().numel() <= 3
    stored = quantizer.stored(weights.detach())
    scales = torch.from_numpy(stored.channel_scales())
    assert torch.equal(torch.from_numpy(stored.doubled_codes()).float() * (scales / 2), values)


def test_ternary_weights_by_their_mean_magnitudes():
    weights, quantizer = made((1.6,), rule="twn", n=200)
    threshold = 0.7 * weights.abs().mean()
    above = weights.abs() > threshold
    assert torch.equal(quantizer.codes(weights), weights.sign() * above)
    level = float(quantizer(weights).detach().max())
    assert level == pytest.approx(float(weights.abs()[above].mean()), rel=0.04)


def test_a_scale_that_outgrows_its_base_doubles_it():
    weights, quantizer = made((4, 4))
    base = quantizer.grid.bases.clone()
    with torch.no_grad():
        quantizer.log_step[0] += math.log(5)
    values = quantizer(weights * 5).detach()
    stored = quantizer.stored(weights * 5)
    assert stored.scales[4].base == np.float32(float(base) * 8)
    scales = torch.from_numpy(stored.channel_scales())
    assert torch.equal(torch.from_numpy(stored.doubled_codes()).float() * (scales / 2), values)


def test_absorbing_a_factor_leaves_every_code():
    weights, quantizer = made((2, 4, 0, 8))
    before, values = quantizer.codes(weights), quantizer(weights).detach()
    factor = torch.tensor([0.01, 3.0, 1.0, 700.0])
    quantizer.absorb(factor)
    assert torch.equal(quantizer.codes(weights), before)
    live = torch.tensor([0, 1, 3])
    after = quantizer(weights).detach()
    assert torch.allclose(after[live], (values * factor[:, None])[live], rtol=0.07)
