"""Statistics against direct computation on the float network."""

import pytest
import torch
from torch import nn

from quant_ops.calibration import HISTOGRAM_BINS, Calibration, calibrate
from quant_ops.executor import Executor
from search.capture import trace


class Mixed(nn.Module):
    """Stride, padding, dilation, groups, a transposed convolution, a linear layer used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, groups=2, padding=1, output_padding=1)
        self.shared = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        return self.shared(torch.relu(self.shared(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(40, 3, 12, 12) + 0.3
    model(x)  # running statistics other than 0 and 1
    return trace(model.eval(), (x,)), model, x


@pytest.fixture(scope="module")
def calibration(network):
    traced, _, x = network
    edges = {node.name: i for i, node in enumerate(traced.graph.nodes)}
    return calibrate(traced.graph, traced.params, [((x[:25],), 0), ((x[25:],), 0)], edges=edges)


def outputs(traced, params, x, index):
    return Executor(traced.graph).run(params, (x,), keep=(index,))[1][index]


def test_folding_leaves_outputs_unchanged(network):
    traced, model, x = network
    (y,) = Executor(traced.graph)(traced.params, (x,))
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["first", "grouped", "up"])
def test_channel_statistics_are_those_of_the_values(network, calibration, name):
    traced, _, x = network
    site = traced.graph.layer_of[name].sites[0]
    source = traced.graph.nodes[site].args[0].index
    value, result = (outputs(traced, traced.params, x, i) for i in (source, site))
    torch.testing.assert_close(calibration.input_mean[name], value.mean((0, 2, 3)))
    torch.testing.assert_close(calibration.input_square[name], value.square().mean((0, 2, 3)))
    torch.testing.assert_close(calibration.output_mean[name], result.mean((0, 2, 3)))
    torch.testing.assert_close(
        calibration.output_std[name], result.std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6
    )


def test_sites_of_one_layer_are_pooled(network, calibration):
    traced, _, x = network
    sites = traced.graph.layer_of["shared"].sites
    values = [outputs(traced, traced.params, x, traced.graph.nodes[s].args[0].index) for s in sites]
    pooled = torch.cat(values)
    assert len(sites) == 2
    torch.testing.assert_close(calibration.input_mean["shared"], pooled.mean(0))
    torch.testing.assert_close(calibration.tap_mean["shared"].flatten(), pooled.mean(0))


@pytest.mark.parametrize("name", ["first", "grouped", "up"])
def test_tap_means_predict_the_mean_output_change_exactly(network, calibration, name):
    from quant_ops.layout import to_canonical

    traced, _, x = network
    layer = traced.graph.layer_of[name]
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(layer.weight_shape, generator=generator)
    moved = {**traced.params, layer.weight: traced.params[layer.weight] + change}
    before, after = (outputs(traced, p, x, layer.sites[0]) for p in (traced.params, moved))
    taps = calibration.tap_mean[name].repeat_interleave(layer.out_channels // layer.groups, dim=0)
    taps = taps.reshape(layer.out_channels, *to_canonical(layer, change).shape[1:])
    predicted = (to_canonical(layer, change) * taps).flatten(1).sum(1)
    measured = (after - before).double().mean((0, 2, 3)).float()
    torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-5)


def test_edges_know_their_range_and_distribution(network, calibration):
    traced, _, x = network
    for index, node in enumerate(traced.graph.nodes):
        value = outputs(traced, traced.params, x, index)
        edge = calibration.edges[node.name]
        assert edge.minimum == pytest.approx(float(value.min()), rel=1e-5)
        assert edge.maximum == pytest.approx(float(value.max()), rel=1e-5)
        assert edge.mean == pytest.approx(float(value.mean()), rel=1e-4, abs=1e-5)
        assert edge.limit >= max(-edge.minimum, edge.maximum)
        assert float(edge.histogram.sum()) == value.numel()
        mean = float((edge.histogram * edge.centers).sum() / edge.histogram.sum())
        assert mean == pytest.approx(edge.mean, abs=2 * edge.limit / HISTOGRAM_BINS)


def test_state_round_trip_keeps_everything(calibration):
    state = calibration.to_state()
    again = Calibration.from_state(state)
    restored = again.to_state()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[key], restored[key]) for key in state)
    assert again.edges["x"].maximum == calibration.edges["x"].maximum


def test_integer_edges_are_left_out():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)).eval()
    tokens = torch.arange(8).reshape(2, 4)
    traced = trace(model, (tokens,))
    edges = {node.name: i for i, node in enumerate(traced.graph.nodes)}
    found = calibrate(traced.graph, traced.params, [((tokens,), None)], edges=edges)
    integers = {n.name for n in traced.graph.nodes if n.dtype == "int64"}
    assert integers
    assert not integers & set(found.edges)
    assert set(found.input_mean) == {"1"}


def test_no_batches_is_an_error(network):
    traced, _, _ = network
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(traced.graph, traced.params, [])
