"""Learning brings outputs nearer to the float ones, keeps sizes, and repeats under a seed."""

import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.blocks import split_into_blocks
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.distill import DistillationSettings, distill, kl_loss, squared_loss
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.layout import to_canonical
from quant_ops.packed import PackedModel
from quant_ops.quantized import ActivationQuant
from quant_ops.reconstruct import ReconstructionSettings, reconstruct
from quant_ops.samples import Samples
from quant_ops.sensitivity import channel_sensitivity, gaussian_gradient, sampled_label_gradient
from quant_ops.soft import SoftActivation, SoftLayer
from search.capture import trace

QUICK = ReconstructionSettings(steps=60, batch=16)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        y = torch.relu(self.second(torch.relu(self.first(y))) + y)
        y = nn.functional.adaptive_avg_pool2d(torch.relu(self.up(y)), 4)
        return self.head(y.reshape(x.shape[0], -1)) * 20


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    # smooth images, whose neighbouring pixels are correlated as in photographs
    x = nn.functional.interpolate(torch.randn(64, 3, 3, 3), size=8, mode="bilinear")
    traced = trace(Small().eval(), (x,))
    batches = [((x[:40],), None), ((x[40:],), None)]
    edges = {e.name: e.node for e in activation_edges(traced.graph)}
    calibration = calibrate(traced.graph, traced.params, batches, edges=edges)
    return traced, calibration, batches


def started(network, widths, bits=None):
    """Nearest rounding, no correction, and the float weights; `bits` of every inner edge."""
    traced, calibration, _ = network
    bank = WeightBank(traced.graph, traced.params, calibration, bias_correction=False)
    layers = {layer.name: layer for layer in traced.graph.layers}
    edges = [e.name for e in activation_edges(traced.graph) if e.kind == "inner"] if bits else []
    candidate = Candidate.of(dict.fromkeys(layers, 4) | widths, dict.fromkeys(edges, bits))
    wanted = {
        name: to_canonical(layer, traced.params[layer.weight]).double().flatten(1)
        for name, layer in layers.items()
    }
    return bank.quantize(candidate), wanted


def divergence(network, model) -> float:
    traced, _, batches = network
    executor = Executor(traced.graph)
    hooks = {
        edge.node: model.activations[edge.name].fake_quantize
        for edge in activation_edges(traced.graph)
        if edge.name in model.activations
    }
    total = 0.0
    for inputs, _ in batches:
        outputs, _ = executor.run(model.params(), inputs, transforms=hooks)
        total += float(kl_loss(outputs, executor(traced.params, inputs))) * len(inputs[0])
    return total


def same(first, second) -> bool:
    return all(
        np.array_equal(a.codes, b.codes)
        and np.array_equal(a.channel_scales(), b.channel_scales())
        and np.array_equal(a.bias.values, b.bias.values)
        for a, b in zip(first.layers.values(), second.layers.values(), strict=True)
    )


TERNARY = {"stem": 3, "first": 1.6, "second": 2, "up": 2}


@pytest.mark.parametrize("bits", [None, 4])
def test_reconstruction_lowers_the_divergence_and_keeps_the_size(network, bits):
    traced, _, batches = network
    start, wanted = started(network, TERNARY, bits)
    learned = reconstruct(
        start, traced.params, batches, wanted, output_loss=kl_loss, settings=QUICK
    )
    assert learned.candidate == start.candidate
    assert divergence(network, learned) < 0.85 * divergence(network, start)
    sizes = [PackedModel.from_model(m).size_bytes for m in (start, learned)]
    assert sizes[0] == sizes[1]
    for name, activation in learned.activations.items():
        assert activation.scale != start.activations[name].scale


def test_reconstruction_repeats_under_one_seed(network):
    traced, _, batches = network
    start, wanted = started(network, TERNARY)
    settings = ReconstructionSettings(steps=10, batch=16, seed=3)
    first, second = (
        reconstruct(start, traced.params, batches, wanted, output_loss=kl_loss, settings=settings)
        for _ in range(2)
    )
    assert same(first, second)
    assert not same(first, start)


def test_models_that_begin_alike_share_their_first_blocks(network):
    traced, _, batches = network
    known, settings = {}, ReconstructionSettings(steps=10, batch=16)
    results = []
    for widths in (TERNARY, TERNARY | {"up": 3}):
        start, wanted = started(network, widths)
        results.append(
            [
                reconstruct(
                    start,
                    traced.params,
                    batches,
                    wanted,
                    output_loss=kl_loss,
                    settings=settings,
                    known=memory,
                )
                for memory in (known, None)
            ]
        )
        n_blocks = len(split_into_blocks(traced.graph))
    assert all(same(shared, alone) for shared, alone in results)
    # the second network differs from its next to last block on
    assert len(known) == n_blocks + 2


def test_a_window_learns_blocks_together(network):
    traced, _, batches = network
    start, wanted = started(network, TERNARY)
    settings = ReconstructionSettings(steps=60, batch=16, window=2)
    told = []
    learned = reconstruct(
        start, traced.params, batches, wanted,
        output_loss=kl_loss, settings=settings, on_block=lambda *at: told.append(at),
    )  # fmt: skip
    assert divergence(network, learned) < 0.85 * divergence(network, start)
    windows = len(split_into_blocks(traced.graph)) - 1
    assert told == [(i, windows) for i in range(1, windows + 1)]


def test_whole_batches_serve_networks_of_a_fixed_batch_size(network):
    traced, _, batches = network
    start, wanted = started(network, TERNARY)
    settings = ReconstructionSettings(steps=60, batch=None)
    learned = reconstruct(
        start, traced.params, batches, wanted, output_loss=kl_loss, settings=settings
    )
    assert divergence(network, learned) < divergence(network, start)


def test_pruned_channels_stay_zero(network):
    traced, _, batches = network
    start, wanted = started(network, {"first": LayerQuant((0, 0, 2, 2, 1, 1.6, 3, 4))})
    learned = reconstruct(
        start, traced.params, batches, wanted, output_loss=kl_loss, settings=QUICK
    )
    assert not learned.layers["first"].codes[:2].any()
    assert learned.layers["first"].bias.values[:2].tolist() == [0, 0]


def test_distillation_moves_scales_and_biases_not_codes(network):
    traced, _, batches = network
    start, _ = started(network, TERNARY, 4)
    settings = DistillationSettings(epochs=20, batch=16, rate=1e-3)
    learned = distill(start, traced.params, batches, settings=settings)
    assert divergence(network, learned) < 0.85 * divergence(network, start)
    for name, layer in learned.layers.items():
        assert np.array_equal(layer.codes, start.layers[name].codes)


@pytest.mark.parametrize("scheme", ["auto", "mid_rise", "affine"])
@pytest.mark.parametrize("name", ["stem", "up", "head"])
def test_a_soft_layer_starts_and_ends_where_it_was(network, name, scheme):
    traced, calibration, _ = network
    layer = traced.graph.layer_of[name]
    bank = WeightBank(traced.graph, traced.params, calibration)
    group = 4 if name == "head" else None
    quantized = bank.layer(name, LayerQuant((3,), scheme, group))
    weight = quantized.weight(layer)
    fixed = SoftLayer(layer, quantized, None)
    torch.testing.assert_close(fixed.weight(), weight, rtol=1e-6, atol=0)
    assert np.array_equal(fixed.result().codes, quantized.codes)
    learned = SoftLayer(layer, fixed.result(), torch.zeros(layer.out_channels, 1).double())
    assert np.array_equal(learned.result().codes, quantized.codes)
    # what the forward pass uses is what is stored
    torch.testing.assert_close(
        fixed.result().weight(layer), fixed.weight().detach(), rtol=1e-6, atol=0
    )


def test_a_soft_activation_is_the_stored_one():
    x = torch.linspace(-2, 2, 101)
    for quant in (ActivationQuant(4, False, 0.1), ActivationQuant(3, True, 0.3, -1)):
        soft = SoftActivation(quant)
        torch.testing.assert_close(soft(x), quant.fake_quantize(x))
        assert soft.result().scale == pytest.approx(quant.scale, rel=1e-6)


def test_sensitivity_is_larger_where_the_output_looks(network):
    traced, _, batches = network
    params = dict(traced.params)
    layer = traced.graph.layer_of["up"]
    weight = params[layer.weight].clone()
    weight[0] *= 10  # of the first channel of the residual block's output
    params[layer.weight] = weight
    nodes = [block.targets[0] for block in split_into_blocks(traced.graph)[:-1]]
    for gradient in (sampled_label_gradient, gaussian_gradient):
        found = channel_sensitivity(traced.graph, params, Samples(batches, 16), nodes, gradient)
        assert all(float(s.mean()) == pytest.approx(1, rel=1e-4) for s in found.values())
        assert int(found[nodes[1]].flatten().argmax()) == 0


def test_losses_are_zero_at_the_float_outputs():
    y = [torch.randn(4, 3)]
    assert float(kl_loss(y, y)) == pytest.approx(0, abs=1e-6)
    assert float(squared_loss(y, y)) == 0
    assert float(squared_loss([torch.zeros(4, 3)], y)) == pytest.approx(1)


def test_learning_without_data_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        Samples([], 4)
