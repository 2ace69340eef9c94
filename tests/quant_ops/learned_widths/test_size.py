"""The expected size is the exact one where widths are whole, and its slopes are those of files."""

import random

import pytest
import torch
from torch import nn

from quant_ops.candidate import Candidate
from quant_ops.learned_widths.fracbits import FracBits
from quant_ops.learned_widths.size import ExpectedSize, with_widths
from quant_ops.packed_size import size_bytes
from quant_ops.testing import random_candidate
from search.capture import trace

WIDTHS = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)


class Block(nn.Module):
    """Residual, grouped, shared and float parts, and a flattening."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1))
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        x = torch.relu(self.depthwise(x)) * self.gain
        return self.head(torch.relu(self.up(x)).flatten(1))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return trace(Block().eval(), (torch.rand(2, 3, 2, 2),)).graph


def bits_of(graph, candidate):
    return {
        name: torch.tensor(quant.per_channel(graph.layer_of[name].out_channels)).float()
        for name, quant in candidate.layers
    }


def other_widths(generator, graph, candidate):
    widths = {}
    for name, _ in candidate.layers:
        n = graph.layer_of[name].out_channels
        zero = generator.random() < 0.5
        widths[name] = tuple(generator.choice(WIDTHS if zero else WIDTHS[1:]) for _ in range(n - 1))
        widths[name] += (4,)  # no value loses all of its channels
    return with_widths(candidate, widths)


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_file_where_it_was_measured_and_nearly_elsewhere(graph, seed):
    generator = random.Random(seed)
    candidate = random_candidate(generator, graph)
    other = other_widths(generator, graph, candidate)
    size = ExpectedSize(graph, candidate)
    exact = size_bytes(graph, other)
    assert abs(float(size(bits_of(graph, other))) - exact) <= size.bound()
    size.refresh(other)
    assert float(size(bits_of(graph, other))) == pytest.approx(exact, rel=1e-6)


def test_removed_channels_take_the_inputs_of_their_consumers_along(graph):
    names = [layer.name for layer in graph.searchable_layers]
    full = Candidate.of(dict.fromkeys(names, 4.0))
    inner = next(name for name in names if "inner" in name)
    pruned = with_widths(full, {inner: (0,) * 5 + (4,) * 7})
    size = ExpectedSize(graph, full)
    less = float(size(bits_of(graph, full))) - float(size(bits_of(graph, pruned)))
    # rows: a scale, a bias and 8 x 9 weights each; columns of the next: 8 x 9 weights each
    assert less == pytest.approx(5 * (1 + 2 + 36) + 5 * 36)


def test_a_slope_is_the_bytes_that_a_bit_costs(graph):
    names = [layer.name for layer in graph.searchable_layers]
    size = ExpectedSize(graph, Candidate.of(dict.fromkeys(names, 4.0)))
    bits = {
        name: torch.full((graph.layer_of[name].out_channels,), 4.0, requires_grad=True)
        for name in names
    }
    size(bits).backward()
    for name in names:
        expected = graph.layer_of[name].weights_per_channel / 8
        assert bits[name].grad.tolist() == pytest.approx([expected] * len(bits[name]))


def test_tied_channels_share_what_their_removal_saves(graph):
    names = [layer.name for layer in graph.searchable_layers]
    size = ExpectedSize(graph, Candidate.of(dict.fromkeys(names, 4.0)))
    live = {
        name: torch.full((graph.layer_of[name].out_channels,), 0.5, requires_grad=True)
        for name in names
    }
    size({}, live).backward()
    stem, inner, outer, depthwise = (
        next(float(live[n].grad[0]) for n in names if part in n)
        for part in ("stem", "inner", "outer", "depthwise")
    )
    assert inner == pytest.approx(1 + 2 + 8 * 9 * 4 / 8)  # alone: scale, bias, columns of outer
    # stem, outer and depthwise go together; columns of inner and up, and the float gain
    together = 12 * 9 * 4 / 8 + 6 * 4 * 4 / 8 + 4
    assert stem + outer + depthwise == pytest.approx(together + 3 * (1 + 2))


def test_modules_stand_for_layers(graph):
    names = [layer.name for layer in graph.searchable_layers]
    candidate = Candidate.of(dict.fromkeys(names, 4.0))
    size = ExpectedSize(graph, candidate)
    layer = graph.layer_of[names[0]]
    weight = torch.randn(layer.out_channels, layer.weights_per_channel)
    modules = {names[0]: FracBits.of(weight, legal=(0, 2, 4, 8), group=1, start=8)}
    choice = size.choice(modules)
    assert choice.assignment[names[0]].bit_widths == (8,)
    assert abs(float(size.of(modules).detach()) - size_bytes(graph, choice)) <= size.bound()
    size.of(modules).backward()
    assert (modules[names[0]].width.grad > 0).all()
    assert set(size.state_dict()) == {"constant"}
