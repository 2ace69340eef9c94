import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from cost_models.size import SLACK_BYTES, PackedSize, constant, linear_terms
from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.packed_size import size_bytes
from quant_ops.storage import width_counts
from search.capture import trace


class Block(nn.Module):
    """A CIFAR residual block with the parameter-free shortcut of option A."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.stride = n_out // n_in
        self.pad = (n_out - n_in) // 2
        self.one = nn.Conv2d(n_in, n_out, 3, stride=self.stride, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(n_out)
        self.two = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(n_out)

    def forward(self, x):
        y = self.norm_two(self.two(functional.relu(self.norm_one(self.one(x)))))
        if self.pad:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, n_blocks):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [(16, 16)] * n_blocks
        widths += [(16, 32)] + [(32, 32)] * (n_blocks - 1)
        widths += [(32, 64)] + [(64, 64)] * (n_blocks - 1)
        self.blocks = nn.Sequential(*(Block(*pair) for pair in widths))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        x = functional.avg_pool2d(x, x.size(3)).flatten(1)
        return self.fc(x)


@pytest.fixture(scope="module")
def resnet20():
    return trace(ResNet(3), (torch.randn(2, 3, 32, 32),)).graph


def codes_and_channels(graph, candidate):
    """Bytes of codes, and of per-channel scales and biases."""
    codes = channels = 0
    for name, quant in candidate.layers:
        layer = graph.layer_of[name]
        for width, n in width_counts(layer, quant).items():
            codes += -(-n * layer.weights_per_channel * int(width) // 8)
            channels += n * (1 + 2 * (layer.bias is not None))
    return codes, channels


@pytest.mark.parametrize("width", [1, 4, 8])
def test_manifest_and_header_of_resnet20_stay_below_1500_bytes(resnet20, width):
    assert len(resnet20.searchable_layers) == 20
    candidate = Candidate.of({layer.name: width for layer in resnet20.searchable_layers})
    overhead = size_bytes(resnet20, candidate) - sum(codes_and_channels(resnet20, candidate))
    assert overhead <= 1500


def test_cost_model_is_the_size_formula(resnet20):
    candidate = Candidate.of({layer.name: 3 for layer in resnet20.searchable_layers})
    assert PackedSize().cost(resnet20, candidate) == size_bytes(resnet20, candidate)


@pytest.mark.parametrize("seed", range(30))
def test_layer_terms_add_up_to_the_size(resnet20, seed):
    rng = random.Random(seed)
    choices = [b for b in BIT_WIDTHS if b] + [32, 32]
    widths = {layer.name: rng.choice(choices) for layer in resnet20.searchable_layers}
    candidate = Candidate.of({name: width for name, width in widths.items() if width != 32})
    total = constant(resnet20) + sum(
        linear_terms(resnet20, name, width) for name, width in widths.items()
    )
    assert 0 <= total - size_bytes(resnet20, candidate) <= SLACK_BYTES


def test_a_wider_layer_costs_more(resnet20):
    layer = resnet20.searchable_layers[3].name
    terms = [linear_terms(resnet20, layer, width) for width in (*BIT_WIDTHS, 32)]
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)


def test_an_explicit_scheme_has_its_own_term(resnet20):
    layer = resnet20.searchable_layers[3]
    plain = linear_terms(resnet20, layer.name, 4)
    affine = linear_terms(resnet20, layer.name, LayerQuant((4,), "affine"))
    assert affine - plain == layer.out_channels
