"""Training as four vectors changes nothing but the time that it takes."""

import copy

import pytest
import torch
from torch import nn

from quant_ops.hgq import (
    Arithmetic,
    FusedTraining,
    HGQActivation,
    HGQConv1d,
    HGQLinear,
    QuantizerSpec,
    ebops,
    penalty,
    trace_ranges,
)
from quant_ops.hgq.layers import LayerSpecs

SYMMETRIC = Arithmetic("RND", "SAT_SYM")


def network(arithmetic=SYMMETRIC, *, bias=True, specs=None):
    torch.manual_seed(0)
    one = QuantizerSpec("kbi", True, 0, 3, arithmetic)
    specs = specs or LayerSpecs(weight=one, bias=one)
    sizes = [(6, 7), (7, 5), (5, 3)]
    layers = [HGQLinear(*size, bias, specs=specs) for size in sizes]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.PReLU(), layers[2]).train()


def train(run, price, parameters, n_steps):
    optimizer = torch.optim.Adam(parameters, 0.05)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(n_steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        loss = (run(x) - x[:, :3].relu()).square().mean() + price()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("arithmetic", [SYMMETRIC, Arithmetic("RND_CONV", "SAT")])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_states_are_those_of_the_layers(arithmetic, bias):
    plain, model = network(arithmetic, bias=bias), network(arithmetic, bias=bias)
    fused = FusedTraining(model)
    wanted = train(plain, lambda: penalty(plain, beta=1e-4, gamma=1e-3), plain.parameters(), 30)
    came = train(fused, lambda: fused.penalty(beta=1e-4, gamma=1e-3), fused.parameters(), 30)
    assert came == pytest.approx(wanted, rel=1e-6)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=name)
    assert fused.ebops().item() == ebops(plain).item()


def test_gradients_are_those_of_the_layers():
    plain, model = network(), network()
    fused = FusedTraining(model)
    x = torch.randn(9, 6)
    (plain(x).square().sum() + penalty(plain, beta=0.01, gamma=0.1)).backward()
    (fused(x).square().sum() + fused.penalty(beta=0.01, gamma=0.1)).backward()

    def joined(find):
        return torch.cat([find(m).grad.reshape(-1) for m in plain if isinstance(m, HGQLinear)])

    torch.testing.assert_close(
        fused.fraction_bits.grad, joined(lambda m: m.input_quantizer.fraction_bits)
    )
    both = [
        q for m in plain if isinstance(m, HGQLinear) for q in (m.weight_quantizer, m.bias_quantizer)
    ]
    for name in ("total_bits", "integer_bits"):
        wanted = torch.cat([getattr(q, name).grad.reshape(-1) for q in both])
        torch.testing.assert_close(getattr(fused, name).grad, wanted)
    values = [
        p.grad.reshape(-1) for m in plain if isinstance(m, HGQLinear) for p in (m.weight, m.bias)
    ]
    torch.testing.assert_close(fused.values.grad, torch.cat(values))


def test_the_model_stays_usable():
    model = network()
    fused = FusedTraining(model)
    train(fused, lambda: fused.penalty(beta=1e-4), fused.parameters(), 5)
    x = torch.randn(8, 6)
    trace_ranges(model, [x])
    other = network()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert torch.equal(fused(x), other(x))
    assert torch.equal(copy.deepcopy(model).train()(x), other.train()(x))
    FusedTraining(other)
    fresh = network().state_dict()
    model.load_state_dict(fresh)
    assert torch.equal(fused.values[:42].view(7, 6), fresh["0.weight"])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(HGQConv1d(2, 2, 1, input_size=(4,))), "a layer HGQConv1d"),
        (nn.Sequential(HGQLinear(2, 2)), "saturating"),
        (network(specs=LayerSpecs(bias=None)), "bias that is not quantized"),
        (nn.Sequential(network(), HGQActivation((1, 3))), "belongs to no layer"),
    ],
)
def test_what_it_does_not_take_is_refused(model, says):
    with pytest.raises(ValueError, match=rf"{says}.*; train with quant_ops.hgq.quantize_together"):
        FusedTraining(model)


def test_inputs_are_a_batch_of_features_and_layers_run_once():
    model = network()
    fused = FusedTraining(model)
    with pytest.raises(ValueError, match="run a forward pass in training mode"):
        fused.penalty(beta=1)
    with pytest.raises(ValueError, match=r"an input of shape \(2, 4, 6\)"):
        fused(torch.randn(2, 4, 6))
    del model[0:2]
    with pytest.raises(ValueError, match="exactly once"):
        fused(torch.randn(2, 7))
