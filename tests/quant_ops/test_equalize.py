"""Equalized networks compute the same, with equal ranges on both sides of every pair."""

import pytest
import torch
from torch import nn

from quant_ops.calibration import calibrate
from quant_ops.equalize import absorb_high_biases, equalize, homogeneous_pairs
from quant_ops.executor import Executor
from quant_ops.layout import to_canonical
from search.capture import trace


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(y) + x).mean(dim=(2, 3)))


def separable(clip):
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), clip,
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), clip,
        nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 4),
    )  # fmt: skip


NETWORKS = {
    "residual": (Residual, [("first", "second")]),
    "depthwise": (lambda: separable(nn.ReLU()), [("0", "3"), ("3", "6"), ("6", "8")]),
    "clipped": (lambda: separable(nn.ReLU6()), [("6", "8")]),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.LeakyReLU(), nn.Linear(9, 4)),
        [("0", "2")],
    ),
    "grouped and transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2),
        ),
        [("0", "3"), ("3", "5")],
    ),
}  # fmt: skip


def traced_network(name):
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # channels that differ widely
            if parameter.dim() > 1:
                spread = torch.rand(len(parameter)) * 3 - 1.5
                parameter.mul_(torch.exp(spread).reshape(-1, *[1] * (parameter.dim() - 1)))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    x = torch.randn(16, 7) if name == "perceptron" else torch.randn(16, 3, 6, 6)
    return trace(model, (x,)), x


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_those_without_anything_else_between(name):
    traced, _ = traced_network(name)
    pairs = [(p.first, p.second) for p in homogeneous_pairs(traced.graph)]
    assert pairs == NETWORKS[name][1]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_ranges_become_equal(name):
    traced, x = traced_network(name)
    executor = Executor(traced.graph)
    params, divided = equalize(traced.graph, traced.params)
    before, after = (executor(p, (x,))[0] for p in (traced.params, params))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    for pair in homogeneous_pairs(traced.graph):
        first, second = (traced.graph.layer_of[n] for n in (pair.first, pair.second))
        made = to_canonical(first, params[first.weight]).flatten(1).abs().amax(dim=1)
        read = to_canonical(second, params[second.weight])
        read = read.reshape(second.groups, -1, read.shape[1], read[0, 0].numel()).abs()
        read = read.amax(dim=(1, 3)).reshape(-1, pair.spread).amax(dim=1)
        assert torch.allclose(made, read, rtol=1e-3)
        assert bool((divided[pair.first] > 0).all())


def test_a_dead_channel_stays():
    traced, x = traced_network("perceptron")
    params = dict(traced.params)
    name = traced.graph.layer_of["0"].weight
    params[name] = params[name].clone()
    params[name][2] = 0
    new, divided = equalize(traced.graph, params)
    assert float(divided["0"][2]) == 1
    executor = Executor(traced.graph)
    before, after = (executor(p, (x,))[0] for p in (params, new))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_high_biases_move_on_and_values_above_them_are_untouched():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.1, -5.0]))
    x = torch.rand(64, 3, 6, 6) * 2 - 1  # bounded, so that nothing falls below 3 deviations
    traced = trace(model, (x,))
    statistics = calibrate(traced.graph, traced.params, [((x,), None)], edges={})
    params, levels = absorb_high_biases(
        traced.graph, traced.params, statistics.output_mean, statistics.output_std
    )
    (level,) = levels.values()
    assert bool((level[:2] > 1).all())
    assert level[2:].tolist() == [0, 0, 0]
    executor = Executor(traced.graph)
    before, after = (executor(p, (x,))[0] for p in (traced.params, params))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_a_padded_layer_absorbs_nothing():
    traced, x = traced_network("depthwise")
    statistics = calibrate(traced.graph, traced.params, [((x,), None)], edges={})
    high = {name: mean + 100 for name, mean in statistics.output_mean.items()}
    _, levels = absorb_high_biases(traced.graph, traced.params, high, statistics.output_std)
    assert "0" not in levels
    assert "3" in levels
