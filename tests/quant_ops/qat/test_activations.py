"""Learned activation quantizers: closed-form gradients, first batch, what is stored."""

import math

import pytest
import torch

from quant_ops.qat.activations import LearnedActivation
from quant_ops.quantized import ActivationQuant

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 2


def gradients(module, x=X):
    x = x.clone().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (module(x) * upstream).sum().backward()
    return x.grad, upstream


@pytest.mark.parametrize(
    "quant", [ActivationQuant(4, True, 0.2), ActivationQuant(3, False, 0.3, 2)]
)
def test_values_and_stored_quantizer_are_those_given(quant):
    module = LearnedActivation.of(quant)
    assert torch.equal(module(X), quant.fake_quantize(X))
    assert module.stored() == quant


def test_the_step_has_the_gradient_of_the_paper():
    module = LearnedActivation(3, signed=True, scale=0.4)
    by_x, upstream = gradients(module)
    at = X / 0.4
    inside = (at >= -4) & (at <= 3)
    assert torch.equal(by_x, upstream * inside)
    slope = torch.where(inside, at.round() - at, at.clamp(-4, 3))
    wanted = float((upstream * slope).sum()) / math.sqrt(40 * 3) / 0.4
    assert float(module.log_scale.grad) == pytest.approx(wanted, rel=1e-4)


def test_an_offset_is_learned_from_what_lies_outside():
    module = LearnedActivation(3, signed=True, scale=0.4, zero_point=1, rule="lsq+")
    _, upstream = gradients(module)
    at = X / 0.4 + 1
    outside = (at < -4) | (at > 3)
    wanted = -0.4 * float((upstream * outside).sum()) / math.sqrt(40 * 2)
    assert float(module.zero_point.grad) == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        module.zero_point.fill_(-1.3)
    assert module.stored().zero_point == -1
    assert torch.equal(module(X), module.stored().fake_quantize(X))


def test_a_clip_learns_from_values_beyond_it_and_in_the_refined_form_from_all():
    clip, n_levels = 0.2 * 7, 7
    for rule in ("pact", "pact+"):
        module = LearnedActivation(3, signed=False, scale=0.2, rule=rule)
        by_x, upstream = gradients(module)
        beyond, inside = clip < X, (X >= 0) & (clip >= X)
        assert torch.equal(by_x, upstream * inside)
        wanted = (upstream * beyond).sum()
        if rule == "pact+":
            at = X / 0.2
            wanted = wanted + (upstream * inside * (at.round() - at)).sum() / n_levels
        # of the logarithm, scaled such that descent changes the clip as the paper's does
        assert float(module.log_scale.grad) == pytest.approx(float(wanted) / clip, rel=1e-4)


def test_without_a_step_the_first_batch_sets_it():
    module = LearnedActivation(4, signed=True)
    module.train()(X)
    wanted = 2 * float(X.abs().mean()) / math.sqrt(7)
    assert float(module.log_scale.detach().exp()) == pytest.approx(wanted, rel=1e-5)
    before = module.log_scale.detach().clone()
    module(10 * X)
    assert torch.equal(module.log_scale.detach(), before)
