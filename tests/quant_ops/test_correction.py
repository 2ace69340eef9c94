"""Corrections restore the statistics that they are for."""

import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.correction import mean_and_spread_corrected, reestimate_norms, spread_factor
from quant_ops.executor import Executor
from search.capture import trace


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    model(x)
    traced = trace(model.eval(), (x,))
    quantized = ("input", "relu.default")
    edges = {n.name: i for i, n in enumerate(traced.graph.nodes) if n.op in quantized}
    calibration = calibrate(traced.graph, traced.params, [((x,), None)], edges=edges)
    return traced, calibration, x


def moments(traced, params, x, site, transforms=None):
    _, kept = Executor(traced.graph).run(params, (x,), keep=(site,), transforms=transforms)
    rows = kept[site].double().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


@pytest.mark.parametrize("bit_width", [1, 1.6, 2, 4])
@pytest.mark.parametrize("name", ["0", "3", "6", "10"])
def test_bias_correction_keeps_channel_means(network, name, bit_width):
    traced, calibration, x = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    params = bank.params(Candidate.of({name: bit_width}))
    site = traced.graph.layer_of[name].sites[0]
    wanted, spread = moments(traced, traced.params, x, site)
    found, _ = moments(traced, params, x, site)
    assert bool(((found - wanted).abs() < 1e-4 * spread + 1e-4 * wanted.abs().max()).all())


def test_without_correction_means_move(network):
    traced, calibration, x = network
    bank = WeightBank(traced.graph, traced.params, calibration, bias_correction=False)
    site = traced.graph.layer_of["3"].sites[0]
    wanted, spread = moments(traced, traced.params, x, site)
    found, _ = moments(traced, bank.params(Candidate.of({"3": 2})), x, site)
    assert float(((found - wanted).abs() / spread).max()) > 0.02


def test_published_mean_and_spread_correction_restores_both():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator) + 0.2
    quantized = torch.round(rows)
    corrected = mean_and_spread_corrected(rows, quantized)
    torch.testing.assert_close(corrected.mean(1), rows.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(corrected.std(1), rows.std(1), rtol=1e-5, atol=1e-6)


def test_a_row_without_spread_is_left_alone():
    assert spread_factor(torch.zeros(2, 4), torch.ones(2, 4)).tolist() == [1, 1]


def test_spread_correction_moves_scales_not_codes(network):
    traced, calibration, _ = network
    plain, stretched = (
        WeightBank(traced.graph, traced.params, calibration, spread_correction=on).layer(
            "0", LayerQuant((2,))
        )
        for on in (False, True)
    )
    layer = traced.graph.layer_of["0"]
    assert np.array_equal(plain.codes, stretched.codes)
    wanted = traced.params[layer.weight].flatten(1).std(1)
    found = stretched.weight(layer).flatten(1).std(1)
    np.testing.assert_allclose(found, wanted, rtol=0.033)


@pytest.mark.parametrize("activations", [{}, {"relu": 4, "relu_1": 4, "input": 8}])
@pytest.mark.parametrize("widths", [2, 3, LayerQuant((4, 2, 0, 3, 3, 2, 1, 1.6))])
def test_reestimation_restores_means_and_spreads(network, widths, activations):
    traced, calibration, x = network
    bank = WeightBank(traced.graph, traced.params, calibration, bias_correction=False)
    candidate = Candidate.of({"0": widths, "3": widths, "6": 3, "10": 4}, activations)
    before = bank.quantize(candidate)
    after = reestimate_norms(before, calibration, [((x,), None)])
    transforms = {traced.graph.index_of[n]: a.fake_quantize for n, a in before.activations.items()}
    for name, layer in after.layers.items():
        assert np.array_equal(layer.codes, before.layers[name].codes)
        site = traced.graph.layer_of[name].sites[0]
        wanted_mean, wanted_std = moments(traced, traced.params, x, site)
        mean, std = moments(traced, after.params(), x, site, transforms)
        live = torch.tensor([w != 0 for w in layer.bit_widths])
        # As near as stored biases are spaced.
        assert float((mean - wanted_mean)[live].abs().max()) < float(layer.bias.base)
        # As near as stored scales are spaced.
        torch.testing.assert_close(std[live], wanted_std[live], rtol=0.035, atol=0)
        assert bool((mean[~live] == 0).all())


def test_reestimation_in_batches_is_close_to_that_in_one(network):
    traced, calibration, x = network
    bank = WeightBank(traced.graph, traced.params, calibration, bias_correction=False)
    before = bank.quantize(Candidate.of({"0": 2, "3": 2, "6": 2, "10": 4}))
    batches = [((x[:32],), None), ((x[32:],), None)]
    after = reestimate_norms(before, calibration, batches)
    site = traced.graph.layer_of["6"].sites[0]
    wanted, spread = moments(traced, traced.params, x, site)
    found, _ = moments(traced, after.params(), x, site)
    was, _ = moments(traced, before.params(), x, site)
    assert float(((found - wanted) / spread).abs().max()) < 0.1
    assert (found - wanted).norm() < 0.3 * (was - wanted).norm()


def test_reestimation_without_data_is_an_error(network):
    traced, calibration, _ = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_norms(bank.quantize(Candidate.of({"0": 2})), calibration, [])
