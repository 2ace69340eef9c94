import copy
import math

import pytest
import torch
from torch import nn

from quant_ops.hgq import (
    Arithmetic,
    BudgetController,
    HGQActivation,
    HGQConv2d,
    HGQLinear,
    KBIQuantizer,
    KIFQuantizer,
    LogLinearBeta,
    QuantizerSpec,
    code_bytes,
    digit_span_ebops,
    ebops,
    penalty,
    quantize_together,
    trace_ranges,
)
from quant_ops.hgq.layers import BIASES, WEIGHTS, LayerSpecs
from quant_ops.hgq.totals import digit_spans

SYMMETRIC = Arithmetic("RND", "SAT_SYM")


def network(specs=LayerSpecs(), seed=0):  # noqa: B008
    torch.manual_seed(seed)
    return nn.Sequential(
        HGQLinear(6, 5, specs=specs), nn.ReLU(), HGQLinear(5, 3, specs=specs)
    ).train()


@pytest.mark.parametrize(
    ("rounding", "overflow", "says"),
    [
        ("RND_UP", "WRAP", "rounding 'RND_UP' is not known; use one of TRN, "),
        ("RND", "SYM", "overflow 'SYM' is not known; use one of WRAP, SAT"),
        ("TRN", "WRAP_SM", "WRAP_SM goes with rounding RND or RND_CONV, not TRN"),
    ],
)
def test_unknown_modes_are_refused(rounding, overflow, says):
    with pytest.raises(ValueError, match=says):
        Arithmetic(rounding, overflow)


def test_gradients_are_the_stated_surrogate():
    spec = QuantizerSpec("kif", True, 1, 2, SYMMETRIC, "tensor")
    quantizer = KIFQuantizer((1,), spec).train()
    x = torch.tensor([0.3, -1.9, 5.0, -7.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [0.25, -1.75, 1.75, -1.75]
    y.sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 0]
    # -1.9 is clipped like the last two: at the ends q = +-(2^i - 2^-f).
    to_fraction = math.log(2) * (0.05 + 0.25 - 0.25 - 0.25)
    assert quantizer.fraction_bits.grad.item() == pytest.approx(to_fraction)
    assert quantizer.integer_bits.grad.item() == pytest.approx(math.log(2) * 2 * (1 - 1 - 1))


def test_a_value_without_bits_is_zero_and_free():
    model = network()
    with torch.no_grad():
        model[2].weight_quantizer.total_bits[0] = 0
    model(torch.randn(4, 6))
    full = model[2].ebops.detach().item()
    with torch.no_grad():
        model[2].weight_quantizer.total_bits[1:] = 0
        model[2].bias_quantizer.total_bits.zero_()
    assert full > 0
    y = model(torch.randn(4, 6))
    assert model[2].ebops.detach().item() == 0
    assert not model.eval()(torch.randn(4, 6)).any()
    assert torch.isfinite(y).all()


def test_a_channel_without_bits_can_grow_again():
    layer = HGQLinear(6, 5).train()
    with torch.no_grad():
        layer.weight_quantizer.total_bits[2] = 0
        layer.weight_quantizer.integer_bits[2] = -3
    layer(torch.randn(8, 6)).sum().backward()
    assert (layer.weight_quantizer.total_bits.grad[2] != 0).all()


def test_kernels_that_would_start_at_zero_keep_a_gradient():
    low = LayerSpecs(QuantizerSpec("kbi", True, 4, -3, SYMMETRIC), bias=None)
    model = network(low)
    for layer in (model[0], model[2]):
        assert layer.quantized_weight().any()
    model(torch.randn(32, 6)).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_inference_weights_are_dyadic_and_what_evaluation_uses():
    model = network()
    with torch.no_grad():
        model[0].weight_quantizer.total_bits.uniform_(0, 9)
    x = torch.randn(16, 6)
    trace_ranges(model, [x])
    layer = model.eval()[0]
    weight = layer.quantized_weight()
    _, fraction_bits = layer.weight_quantizer.whole_bits()
    assert torch.equal(weight * 2**fraction_bits, torch.round(weight * 2**fraction_bits))
    wanted = torch.nn.functional.linear(layer.input_quantizer(x), weight, layer.quantized_bias())
    assert torch.equal(layer(x), wanted)


def test_evaluation_changes_no_state_and_state_dict_restores_all():
    model = network()
    x = torch.randn(16, 6)
    model(x)
    before = copy.deepcopy(model.state_dict())
    y = model.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = network(seed=1)
    other.load_state_dict(before)
    assert torch.equal(other.eval()(x), y)
    assert torch.equal(copy.deepcopy(model.train())(x), model(x))


def test_autocast_leaves_quantized_values_and_ebops_alone():
    model = network()
    x = torch.randn(4, 6)
    model(x)
    wanted = ebops(model).detach().item()
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0].weight_quantizer(model[0].weight)
        model(x)
    assert y.dtype == torch.float32
    assert ebops(model).detach().item() == wanted


def test_one_pass_for_all_parameters_changes_nothing():
    specs = LayerSpecs(bias=QuantizerSpec("kbi", arithmetic=SYMMETRIC))
    for granularity in ("element", "channel", "tensor"):
        weight = QuantizerSpec("kbi", arithmetic=SYMMETRIC, granularity=granularity)
        specs = LayerSpecs(weight, bias=specs.bias)
        one, other = network(specs), network(specs)
        handle = quantize_together(other)
        x = torch.randn(8, 6)
        for model in (one, other):
            loss = model(x).square().sum() + penalty(model, beta=1e-3, gamma=1e-3)
            loss.backward()
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)
        handle.remove()
        assert torch.equal(one(x), other(x))


def test_the_penalty_charges_cost_and_bits():
    model = network()
    model(torch.randn(4, 6))
    n_bits = 30 + 15 + 5 + 3 + 6 + 5
    bits = (30 + 15 + 5 + 3) * 8 + (6 + 5) * 6
    assert ebops(model).detach().item() == sum(
        layer.ebops.detach().item() for layer in model if isinstance(layer, HGQLinear)
    )
    free = penalty(model, beta=0, gamma=1)
    assert free.detach().item() == bits
    free.backward()
    assert sum(p.grad.sum().item() for p in model.parameters() if p.grad is not None) == n_bits
    with pytest.raises(ValueError, match="charge ebops or code_bytes"):
        penalty(model, beta=1, of="lut")


def test_code_bytes_take_the_widest_weight_of_each_channel():
    layer = HGQLinear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight_quantizer.total_bits[0] = torch.tensor([0.0, 1, 2, 3, 1, 2, 0, 3])
        layer.weight_quantizer.total_bits[1] = 0
    cost = code_bytes(layer)
    assert cost.detach().item() == 8 * (3 + 1) / 8
    cost.backward()
    assert layer.weight_quantizer.total_bits.grad[0].sum() == 1


def test_digit_spans_strip_zeros_at_both_ends():
    assert digit_spans(torch.tensor([0.0, 8, 0.5, 5, -0.625, 2.0**-20])).tolist() == [
        0, 1, 1, 3, 3, 1,
    ]  # fmt: skip
    layer = HGQLinear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.25, 0.375], [0, 0.875, -0.625]]).T)
    layer.train()(torch.randn(5, 2))
    bits = layer.input_quantizer.bit_widths()[0].tolist()
    assert digit_span_ebops(layer) == bits[0] * (1 + 1 + 2) + bits[1] * (0 + 3 + 3)
    assert digit_span_ebops(layer) <= layer.ebops.detach().item()


def test_ebops_of_a_convolution_count_real_pixels_only():
    spec = QuantizerSpec("kif", True, 2, 2, SYMMETRIC, "tensor")
    conv = HGQConv2d(1, 1, 3, padding=1, bias=False, specs=LayerSpecs(input=spec))
    conv.train()(torch.randn(1, 1, 4, 4))
    assert conv.ebops.detach().item() == 8 * 4 * 10 * 10  # (3 + 4 + 3)^2 meetings


def test_pixels_need_the_size_of_the_image():
    with pytest.raises(ValueError, match=r"input_size=\(height, width\)"):
        HGQConv2d(1, 1, 3)


def test_an_activation_quantizes_after_its_function():
    spec = QuantizerSpec("kif", False, 1, 1, Arithmetic("RND", "SAT"))
    activation = HGQActivation((1, 3), spec, function=torch.relu).eval()
    assert activation(torch.tensor([[-1.0, 0.3, 9.0]])).tolist() == [[0, 0.5, 1.5]]


def test_integer_bits_of_wrap_follow_the_data_and_decay():
    quantizer = KIFQuantizer((1, 1)).train()
    quantizer(torch.tensor([[3.0]]))
    assert quantizer.integer_bits.item() == 2
    quantizer(torch.tensor([[100.0]]))
    assert quantizer.integer_bits.item() == 7
    quantizer(torch.tensor([[0.0]]))
    assert quantizer.integer_bits.item() == pytest.approx(6.99)


def test_bits_stay_in_their_limits():
    quantizer = KBIQuantizer((2,), QuantizerSpec("kbi", most_bits=7)).train()
    with torch.no_grad():
        quantizer.total_bits.copy_(torch.tensor([-3.0, 30.0]))
    quantizer(torch.ones(2))
    assert quantizer.total_bits.tolist() == [0, 7]


def test_ebops_before_a_forward_pass_say_what_to_do():
    with pytest.raises(ValueError, match="run a forward pass in training mode"):
        ebops(network())
    with pytest.raises(ValueError, match="no HGQ layer"):
        ebops(nn.Linear(2, 2))


def test_beta_rises_log_linearly_after_the_hold():
    schedule = LogLinearBeta(1e-6, 1e-2, hold=0.2)
    assert [schedule(s) for s in (0, 0.2, 1, 2)] == pytest.approx([1e-6, 1e-6, 1e-2, 1e-2])
    assert schedule(0.6) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="both must be positive"):
        LogLinearBeta(0, 1)


def test_the_controller_steers_a_cost_that_falls_with_beta():
    controller = BudgetController(target=5_000, beta=1e-6, i=0.05, warmup=3)
    beta = controller.beta
    betas = []
    for _ in range(400):
        cost = 2.0 * beta**-0.6  # 5,000 at 2.13e-6
        beta = controller.step(cost)
        betas.append(beta)
    assert betas[:3] == [1e-6] * 3
    assert 2.0 * beta**-0.6 == pytest.approx(5_000, rel=0.02)
    again = BudgetController(target=5_000, beta=1.0, i=0.05, warmup=3)
    again.load_state_dict(controller.state_dict())
    assert again.step(4_000) == controller.step(4_000)


def test_a_beta_at_its_limit_does_not_wind_up():
    controller = BudgetController(target=1, beta=1e-6, warmup=0, most=1e-5)
    assert [controller.step(1e6) for _ in range(1000)][-1] == 1e-5
    assert controller.step(1e-6) < 1e-6


def test_a_network_learns_to_be_cheap():
    torch.manual_seed(0)
    model = network()
    x = torch.randn(64, 6)
    y = x[:, :3].relu()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    costs = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() + penalty(model, beta=3e-5)
        loss.backward()
        optimizer.step()
        costs.append(ebops(model).detach().item())
    assert costs[-1] < 0.5 * costs[0]
    assert (model.eval()(x) - y).square().mean() < 0.3
    assert WEIGHTS.form == BIASES.form == "kbi"
