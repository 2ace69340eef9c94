"""A network in training starts as the given one, and is packed exactly as it computes."""

import random
from copy import deepcopy

import pytest
import torch
from torch import nn

from quant_ops.candidate import LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.packed import PackedModel, pack
from quant_ops.qat.averages import Averages
from quant_ops.qat.network import QuantizedNetwork
from quant_ops.qat.oscillation import Oscillations, dampening
from quant_ops.qat.weights import LearnedStep
from quant_ops.testing import random_candidate, random_model
from search.config import RunConfig
from search.prepare import prepare
from search.task import Task


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = (y + self.bn2(self.conv2(y))).relu()
        return self.fc(self.up(y).mean(dim=(2, 3)))


IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 5


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = Small()
    for _ in range(5):  # running statistics that are not those of a new norm
        model.train()(IMAGES)
    task = Task("small", model.eval(), [((IMAGES,), None)], [((IMAGES,), LABELS)])
    return prepare(task, RunConfig())


def run(model, x=IMAGES):
    edges = {e.name: e.node for e in activation_edges(model.graph)}
    hooks = {edges[name]: quant.fake_quantize for name, quant in model.activations.items()}
    return Executor(model.graph).run(model.params(), [x], transforms=hooks)[0]


def contents(model):
    return {name: layer.content() for name, layer in model.layers.items()}


def trained(network, steps=8, rate=1e-2):
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), rate)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(IMAGES)[0], LABELS).backward()
        optimizer.step()
    return network.eval()


def start(prepared):
    return prepared.evaluator.bank.quantize(prepared.space.uniform(3))


@pytest.mark.parametrize("seed", range(12))
def test_any_model_is_where_training_starts_and_what_is_packed(prepared, seed):
    graph, params = prepared.traced.graph, prepared.traced.params
    candidate = random_candidate(random.Random(seed), graph)
    model = random_model(graph, params, candidate, seed)
    network = QuantizedNetwork(graph, params, model)
    with torch.no_grad():
        assert torch.equal(network(IMAGES)[0], run(model)[0])
    assert contents(network.to_model()) == contents(model)
    assert dict(network.to_model().activations) == dict(model.activations)
    trained(network, steps=3)
    after = network.to_model()
    with torch.no_grad():
        assert torch.equal(network(IMAGES)[0], run(after)[0])
    read = PackedModel.from_bytes(pack(after)).model
    whole = [(a, b) for a, b in zip(after.layers.values(), read.layers.values(), strict=True)]
    assert pack(after) == pack(read)
    if not any(0 in layer.bit_widths for layer, _ in whole):
        assert all(a.content() == b.content() for a, b in whole)


def test_training_lowers_the_loss_and_moves_codes(prepared):
    network = QuantizedNetwork(prepared.traced.graph, prepared.traced.params, start(prepared))
    before = nn.functional.cross_entropy(network(IMAGES)[0], LABELS)
    trained(network, steps=40, rate=0.03)
    after = nn.functional.cross_entropy(network(IMAGES)[0], LABELS)
    assert float(after.detach()) < 0.9 * float(before.detach())
    assert contents(network.to_model()) != contents(start(prepared))


def test_given_norms_the_network_computes_what_it_did(prepared):
    traced = prepared.traced
    network = QuantizedNetwork(traced.graph, traced.params, start(prepared)).eval()
    with torch.no_grad():
        before = network(IMAGES)[0]
        network.start_norms(traced.norms, prepared.spec.splits["calibration"].batches)
        assert set(traced.norms) == {n for n, m in network.trained_layers().items() if m.norm}
        assert torch.allclose(network(IMAGES)[0], before, atol=1e-5)
        # with statistics of the same batch, training mode computes the same
        assert torch.allclose(network.train()(IMAGES)[0], before, atol=1e-4)


def test_folding_norms_leaves_codes_and_rounds_scales(prepared):
    traced, batches = prepared.traced, prepared.spec.splits["calibration"].batches
    network = QuantizedNetwork(traced.graph, traced.params, start(prepared))
    network.start_norms(traced.norms, batches)
    trained(network)
    with pytest.raises(ValueError, match="fold_norms"):
        network.to_model()
    network.estimate_norms(batches)
    layers = network.trained_layers()
    codes = {n: m.quantizer.codes(m.real_weights().detach()) for n, m in layers.items()}
    with torch.no_grad():
        before = network(IMAGES)[0]
        network.fold_norms()
        for name, layer in layers.items():
            assert torch.equal(layer.quantizer.codes(layer.real_weights()), codes[name])
        packed = network(IMAGES)[0]
        for layer in layers.values():
            layer.quantizer.on_grid = False
        assert torch.allclose(network(IMAGES)[0], before, atol=2e-4)
        for layer in layers.values():
            layer.quantizer.on_grid = True
    assert torch.equal(packed, run(network.to_model())[0])


def test_estimated_norms_have_the_statistics_of_the_data(prepared):
    traced, batches = prepared.traced, prepared.spec.splits["calibration"].batches
    network = QuantizedNetwork(traced.graph, traced.params, start(prepared))
    network.start_norms(traced.norms, batches)
    trained(network)
    with torch.no_grad():
        by_batch = network.train()(IMAGES)[0]
        network.estimate_norms(batches)
        assert torch.allclose(network.eval()(IMAGES)[0], by_batch, atol=1e-4)


def test_a_state_is_loaded_with_or_without_norms(prepared):
    traced, batches = prepared.traced, prepared.spec.splits["calibration"].batches
    network = QuantizedNetwork(traced.graph, traced.params, start(prepared))
    bare = deepcopy(network.state_dict())
    network.start_norms(traced.norms, batches)
    trained(network)
    other = QuantizedNetwork(traced.graph, traced.params, start(prepared)).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IMAGES)[0], network(IMAGES)[0])
        other.load_state_dict(bare)
        assert torch.equal(other(IMAGES)[0], run(start(prepared))[0])


def test_removed_channels_stay_zero_with_norms_and_without(prepared):
    traced = prepared.traced
    candidate = prepared.space.uniform(3).replace({"conv1": _pruned(8), "conv2": _pruned(8)})
    model = prepared.evaluator.bank.quantize(candidate)
    network = QuantizedNetwork(traced.graph, traced.params, model)
    network.start_norms(traced.norms, prepared.spec.splits["calibration"].batches)
    trained(network)
    outputs = network.train().layer_outputs([IMAGES])
    assert not outputs["conv1"][:, :3].any()
    assert outputs["conv1"][:, 3:].any()
    network.fold_norms()
    after = network.to_model()
    assert torch.equal(network.eval()(IMAGES)[0].detach(), run(after)[0])
    assert not after.layers["conv1"].bias.codes[:3].any()
    assert PackedModel.from_model(after).size_bytes == PackedModel.from_model(model).size_bytes


def _pruned(n):
    return LayerQuant((0.0,) * 3 + (3.0,) * (n - 3))


class Halved(nn.Module):
    """A stand-in for a method of its own."""

    def forward(self, weights):
        return weights / 2


def test_a_layer_may_have_any_module_as_its_quantizer(prepared):
    traced, model = prepared.traced, start(prepared)
    network = QuantizedNetwork(
        traced.graph, traced.params, model, quantizers={"conv1": Halved()}
    ).eval()
    network.start_norms(["conv1"], prepared.spec.splits["calibration"].batches)
    weight = network.trained_layers()["conv1"].weight()
    assert torch.allclose(weight, traced.params["conv1.weight"] / 2)
    with torch.no_grad():
        before = network(IMAGES)[0]
        network.fold_norms()
        assert torch.allclose(network(IMAGES)[0], before, atol=1e-2)
    with pytest.raises(TypeError, match="'conv1' is quantized by Halved"):
        network.to_model()
    assert torch.allclose(network.float_params()["conv1.weight"], traced.params["conv1.weight"])


def test_what_swings_to_and_fro_is_frozen_where_it_mostly_was(prepared):
    network = QuantizedNetwork(prepared.traced.graph, prepared.traced.params, start(prepared))
    layer = network.trained_layers()["fc"]
    quantizer = layer.quantizer
    assert isinstance(quantizer, LearnedStep)
    step = quantizer.log_step.detach().exp() / layer.unit
    offset = quantizer.offset
    with torch.no_grad():
        layer.latent.copy_(((1 + offset) * step).expand_as(layer.latent))
    watch = Oscillations(layer, momentum=0.2)
    with torch.no_grad():
        for swing in (0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1):
            layer.latent[0, 0] = (swing + offset[0, 0]) * step[0, 0]
            watch.update(layer, 1.0)
    assert float(watch.frequency[0, 0]) > 0.1
    assert not watch.frequency[1:].any()
    watch.update(layer, 0.05)
    assert watch.frozen.sum() == 1
    with torch.no_grad():
        layer.latent[0, 0] = -3 * step[0, 0]
        watch.update(layer, 0.05)
    assert float(quantizer.codes(layer.real_weights().detach())[0, 0]) == 1


def test_dampening_is_the_squared_distance_from_levels(prepared):
    network = QuantizedNetwork(prepared.traced.graph, prepared.traced.params, start(prepared))
    layer = network.trained_layers()["fc"]
    quantizer = layer.quantizer
    step = quantizer.log_step.detach().exp()
    with torch.no_grad():
        layer.latent.copy_((0.3 + quantizer.offset) * step / layer.unit)
    value = dampening(layer)
    assert float(value.detach()) == pytest.approx(0.09 * layer.latent.numel(), rel=1e-4)
    value.backward()
    assert layer.latent.grad.any()
    assert quantizer.log_step.grad is None


def test_averages_have_their_closed_form():
    module = nn.Linear(1, 1, bias=False)
    values = [2.0, 5.0, -1.0, 4.0]
    with torch.no_grad():
        module.weight.fill_(values[0])
    averages = Averages(module, decay=0.25)
    for value in values[1:]:
        with torch.no_grad():
            module.weight.fill_(value)
        averages.update(module)
    decays = [min(0.25, (1 + t) / (10 + t)) for t in (1, 2, 3)]
    kept = [1.0]
    for decay in reversed(decays):
        kept.append(kept[-1] * decay)
    weights = [kept[3], *((1 - decays[i]) * kept[2 - i] for i in range(3))]
    averages.copy_to(module)
    wanted = sum(w * v for w, v in zip(weights, values, strict=True))
    assert float(module.weight.detach()) == pytest.approx(wanted)
