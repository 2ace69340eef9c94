"""HGQ as a method of learning widths: the modules' arithmetic, and what is stored of it."""

import math

import numpy as np
import pytest
import torch

from quant_ops.hgq import HGQLinear, KBIQuantizer, QuantizerSpec
from quant_ops.hgq.bridge import quantized_layer, quantized_rows
from quant_ops.hgq.layers import LayerSpecs
from quant_ops.learned_widths.hgq import ARITHMETIC, HGQ, HGQSettings

ALL = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture
def weight():
    return (
        torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 1, 8)[:, None]
    )


@pytest.mark.parametrize("width", [0, 1.6, 3, 5, 8])
def test_hard_weights_are_dyadic_and_stored_as_they_are(width, weight):
    module = HGQ.of(weight, legal=ALL, group=1, start=width).eval()
    values = module(weight).detach()
    exponent = module.integer_bits.detach().round() - max(0, round(width) - 1)
    codes = values * torch.exp2(-exponent)[:, None]
    assert torch.equal(codes, codes.round())
    stored = quantized_rows(values)
    assert all(narrow <= width for narrow in stored.bit_widths)
    decoded = stored.codes * stored.channel_scales() if width else np.zeros((8, 30))
    assert np.array_equal(decoded, values.numpy())


def test_equals_the_layer_of_the_hgq_modules(weight):
    widths = [0, 1.6, 3, 4, 5, 6, 7, 8]
    module = HGQ.of(weight, legal=ALL, group=1, start=widths).eval()
    spec = QuantizerSpec("kbi", arithmetic=ARITHMETIC, granularity="channel")
    layer = HGQLinear(30, 8, bias=False, specs=LayerSpecs(weight=spec))
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        layer.weight.copy_(weight)
        quantizer.total_bits.copy_(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])[:, None])
        quantizer.integer_bits.copy_(module.integer_bits[:, None])
    assert torch.equal(layer.quantized_weight(), module(weight))
    ours, theirs = quantized_rows(module(weight)), quantized_layer(layer)
    assert ours.bit_widths == theirs.bit_widths
    assert np.array_equal(ours.codes, theirs.codes)
    assert np.array_equal(ours.channel_scales(), theirs.channel_scales())


def test_gradients_are_those_of_the_hgq_modules(weight):
    weight = weight[:4]
    module = HGQ.of(weight, legal=ALL, group=2, start=3)
    spec = QuantizerSpec("kbi", arithmetic=ARITHMETIC)
    quantizer = KBIQuantizer((4, 1), spec).train()
    with torch.no_grad():
        module.integer_bits.sub_(1)  # clips some
        quantizer.total_bits.fill_(2)
        quantizer.integer_bits.copy_(module.integer_bits[:, None])
    mine, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    module(mine).square().sum().backward()
    quantizer(other).square().sum().backward()
    assert torch.equal(mine.grad, other.grad)
    per_group = quantizer.total_bits.grad.view(2, 2).sum(dim=1)
    assert torch.allclose(module.width.grad, per_group)
    assert torch.allclose(module.integer_bits.grad, quantizer.integer_bits.grad[:, 0])


def test_a_removed_channel_can_come_back():
    module = HGQ.of(torch.tensor([[0.3, -0.5]]), legal=(0, 2, 4), start=0)
    values = module(torch.tensor([[0.3, -0.5]]))
    assert not values.any()
    values.backward(torch.tensor([[-1.0, 2.0]]))  # larger magnitudes would help
    moved = math.log(2) * 2 ** module.integer_bits.item()
    assert float(module.width.grad) == pytest.approx(-3 * moved)


@pytest.mark.parametrize(
    ("legal", "choices"), [(ALL, (0, 1.6, 3, 4, 5, 6, 7, 8)), ((2, 5), (2, 5))]
)
def test_three_levels_are_ternary_where_that_is_legal(legal, choices):
    assert HGQ.of(torch.ones(1, 2), legal=legal).choices == choices
    with pytest.raises(ValueError, match="HGQ needs one of"):
        HGQ.of(torch.ones(1, 2), legal=(0, 1))


def test_integer_bits_stay_where_one_layer_can_store_them(weight):
    module = HGQ.of(weight, legal=(4,), group=1, start=4)
    with torch.no_grad():
        module.integer_bits[0] -= 40
        module.integer_bits[1] += 40
    values = module.eval()(weight + 1).detach()
    stored = quantized_rows(values)
    assert np.array_equal(stored.codes * stored.channel_scales(), values.numpy())


def test_every_bit_is_charged_gamma(weight):
    module = HGQ.of(weight, legal=(0, 4, 8), group=4, start=4, settings=HGQSettings(gamma=0.5))
    assert module.penalty().item() == 0.5 * (4 + 4)
