import pytest
import torch
from torch import nn

from cost_models.ebops import EBOPs, ebops_of
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import edge_of
from quant_ops.hgq.bridge import quantized_layer
from quant_ops.hgq.fixed_point import Arithmetic
from quant_ops.hgq.layers import HGQConv2d, HGQLinear, LayerSpecs
from quant_ops.hgq.quantizer import QuantizerSpec
from quant_ops.hgq.totals import digit_span_ebops, ebops
from quant_ops.quantized import QuantizedModel
from search.budget import parse_budget
from search.capture import trace

SYMMETRIC = Arithmetic("RND", "SAT_SYM")
SIDE = 6


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 3),
    ).eval()


def learned(bits):
    """The same network of HGQ layers, weights of `bits` digits, activations of 8."""
    activation = QuantizerSpec("kif", False, 3, 5, SYMMETRIC, "tensor")
    weights = [QuantizerSpec("kbi", True, 0, b, SYMMETRIC, "channel") for b in bits]
    one, two, three = (LayerSpecs(w, activation, None) for w in weights)
    model = nn.Sequential(
        HGQConv2d(2, 4, 3, padding=1, stride=2, specs=one),
        nn.ReLU(),
        HGQConv2d(4, 6, 3, groups=2, padding=1, specs=two),
        nn.ReLU(),
        nn.Flatten(),
        HGQLinear(6 * 9, 3, specs=three),
    )
    with torch.no_grad():
        for layer, b in zip((model[0], model[2], model[5]), bits, strict=True):
            layer.weight_quantizer.total_bits.fill_(b)
    return model.train()


@pytest.fixture(scope="module")
def graph():
    return trace(plain(), (torch.randn(2, 2, SIDE, SIDE),)).graph


def edges_at(graph, bits):
    sources = {graph.nodes[layer.sites[0]].args[0].index for layer in graph.layers}
    return {edge_of(graph, index): bits for index in sorted(sources)}


@pytest.mark.parametrize("bits", [(3, 5, 7), (1, 2, 4)])
def test_the_cost_of_uniform_widths_is_what_training_counts(graph, bits):
    model = learned(bits)
    model(torch.rand(2, 2, SIDE, SIDE))
    names = [layer.name for layer in graph.layers]
    widths = dict(zip(names, (float(b + 1) for b in bits), strict=True))
    cost = EBOPs().cost(graph, Candidate.of(widths, edges_at(graph, 8)))
    assert cost == ebops(model).detach().item()


def test_the_digits_of_stored_codes_are_those_of_training():
    model = learned((4, 3, 5))
    with torch.no_grad():
        for layer in (model[0], model[2], model[5]):
            layer.weight.mul_(3)
    x = torch.rand(2, 2, SIDE, SIDE)
    model(x)
    graph = trace(plain(), (x,)).graph
    names = [layer.name for layer in graph.layers]
    layers = {n: quantized_layer(model[i]) for n, i in zip(names, (0, 2, 5), strict=True)}
    candidate = Candidate.of(
        {n: LayerQuant(layer.bit_widths, "mid_tread") for n, layer in layers.items()},
        edges_at(graph, 8),
    )
    quantized = QuantizedModel(graph, candidate, layers, {}, {})
    assert ebops_of(quantized, spans=True) == digit_span_ebops(model)
    assert ebops_of(quantized, spans=True) <= ebops_of(quantized) <= ebops(model).detach().item()


def test_channels_without_bits_and_what_they_feed_are_free(graph):
    first, second, third = (layer.name for layer in graph.layers)
    model = EBOPs()

    def cost(widths):
        quant = LayerQuant(widths)
        return model.cost(graph, Candidate.of({first: quant, second: 3, third: 3}))

    counts_first = (2 + 3 + 3) ** 2  # 6 pixels in steps of 2: the first tap misses one
    counts_second = (2 + 3 + 2) ** 2  # 3 pixels: both outer taps miss one
    per_channel = 32 * (2 * counts_first * 4)
    saved = 32 * counts_second * 3 * 2  # three outputs of its group, 2 digits each
    assert cost((5,)) - cost((0, 5, 5, 5)) == per_channel + saved


def test_float_layers_and_activations_have_32_bits(graph):
    names = [layer.name for layer in graph.layers]
    in_float, binary = EBOPs().cost(graph, Candidate.of({})), dict.fromkeys(names, 1.0)
    assert in_float == 32 * EBOPs().cost(graph, Candidate.of(binary))
    ternary = dict.fromkeys(names, 1.6)
    assert EBOPs().cost(graph, Candidate.of(ternary)) == in_float / 32
    affine = {n: LayerQuant((4,), "affine") for n in names}
    assert EBOPs().cost(graph, Candidate.of(affine)) == in_float / 8


def test_the_budget_has_a_key():
    assert parse_budget("ebops=100k") == ("ebops", 100_000.0)
