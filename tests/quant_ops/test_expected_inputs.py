"""Moments from norms against closed forms, sampling, and what data say."""

import pytest
import scipy.stats
import torch
from torch import nn

from quant_ops.calibration import calibrate
from quant_ops.expected_inputs import data_free, expected_inputs, rectified
from search.capture import trace


@pytest.mark.parametrize("high", [6.0, torch.inf])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.5), (-3.0, 1.0), (5.0, 2.0)])
def test_clipped_moments_are_those_of_a_sample(mean, std, high):
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    sample = torch.from_numpy(scipy.stats.norm.ppf(grid.numpy())) * std + mean
    clipped = sample.clamp(0, high)
    found = rectified(torch.tensor([mean]).double(), torch.tensor([std**2]).double(), 0.0, high)
    assert float(found[0]) == pytest.approx(float(clipped.mean()), abs=1e-4)
    assert float(found[1]) == pytest.approx(float(clipped.var()), abs=1e-3)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.first(x)))
        x = torch.relu(self.norms[1](self.second(x)) + x)
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def normed():
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(256, 3, 12, 12)
    for norm in model.norms:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(x)  # the norms' statistics become those of x
    return trace(model.eval(), (x[:2],)), x


def test_means_agree_with_the_data_that_the_norms_have_seen(normed):
    traced, x = normed
    measured = calibrate(traced.graph, traced.params, [((x,), None)], edges={}).input_mean
    expected = expected_inputs(traced.graph, traced.params, traced.norms)
    assert set(expected) == {"first", "second", "head"}
    for name in ("second", "head"):
        spread = float(measured[name].std())
        assert torch.allclose(expected[name].float(), measured[name].float(), atol=0.3 * spread)


def test_data_free_statistics_replace_the_means_only(normed):
    traced, x = normed
    measured = calibrate(traced.graph, traced.params, [((x,), None)], edges={})
    free = data_free(measured, traced.graph, traced.params, traced.norms)
    assert free.input_square is measured.input_square
    assert free.tap_mean["second"].shape == measured.tap_mean["second"].shape
    assert not torch.equal(free.tap_mean["second"], measured.tap_mean["second"])
    assert not free.tap_mean["first"].any()
