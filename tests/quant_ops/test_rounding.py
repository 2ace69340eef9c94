"""Second-order rounding against brute force, nearest rounding and the layer itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.executor import Executor
from quant_ops.layout import to_canonical
from quant_ops.moments import InputMoments, collect_moments, input_patches
from quant_ops.packed import PackedModel
from quant_ops.rounding import (
    Grid,
    cholesky_rounding,
    coordinate_descent,
    grid_of,
    output_error,
    round_layer,
    round_model,
    signed_codes,
    with_codes,
)
from search.capture import trace

LAYERS = ("0", "2", "4", "6", "10")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(8, 8, (3, 1), padding="same", groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5),
    ).eval()  # fmt: skip
    x = torch.randn(32, 3, 16, 16) + 0.3
    traced = trace(model, (x,))
    batches = [((x,), None)]
    calibration = calibrate(traced.graph, traced.params, batches)
    return traced, calibration, collect_moments(traced.graph, traced.params, batches), batches


def random_problem(seed: int, rows: int = 3, n: int = 4, levels: int = 3):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, rows, n, generator=generator, dtype=torch.float64)
    factor = torch.randn(2, n, n + 2, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.transpose(1, 2) / n + 0.01 * torch.eye(n, dtype=torch.float64)
    scale = 0.5 + torch.rand(2, rows, 1, generator=generator, dtype=torch.float64)
    offset = torch.full((2, rows, 1), 0.5 if seed % 2 else 0.0, dtype=torch.float64)
    low = torch.full_like(offset, -(levels // 2))
    return weights, Grid(scale, low, low + levels - 1, offset), hessian


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_with_uncorrelated_inputs_it_is_nearest_rounding(seed, levels):
    weights, grid, _ = random_problem(seed, n=7, levels=levels)
    identity = torch.eye(7, dtype=torch.float64).expand(2, 7, 7) * 0.7
    codes = cholesky_rounding(weights, grid, identity)
    assert torch.equal(codes, grid.codes(weights))
    again, wanted = coordinate_descent(weights, codes, grid, identity)
    assert torch.equal(again, codes)
    torch.testing.assert_close(wanted, weights)


def test_brute_force_is_a_lower_bound_and_near():
    options = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    for seed in range(40):
        weights, grid, hessian = random_problem(seed)
        nearest = grid.codes(weights)
        rounded = cholesky_rounding(weights, grid, hessian)
        rounded, _ = coordinate_descent(weights, rounded, grid, hessian, sweeps=20)
        choices = [grid.values(grid.low + o.expand_as(weights)) for o in options]
        best = torch.stack([output_error(weights, c, hessian) for c in choices]).amin(0)
        found, plain = (output_error(weights, grid.values(c), hessian) for c in (rounded, nearest))
        assert bool((found >= best - 1e-9).all())
        total += torch.stack([best.sum(), found.sum(), plain.sum()])
    best_total, found_total, plain_total = total.tolist()
    assert found_total - best_total < 0.25 * (plain_total - best_total)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_descent_never_raises_the_error(seed):
    weights, grid, hessian = random_problem(seed, n=12, levels=4)
    codes, errors = grid.codes(weights), []
    for _ in range(4):
        errors.append(output_error(weights, grid.values(codes), hessian))
        codes, _ = coordinate_descent(weights, codes, grid, hessian, sweeps=1)
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before + 1e-9).all())


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_weights_are_the_layer(network, name):
    traced, _, _, batches = network
    graph, params = traced.graph, traced.params
    layer = graph.layer_of[name]
    site = layer.sites[0]
    source = graph.nodes[site].args[0].index
    _, kept = Executor(graph).run(params, batches[0][0], keep=(source, site))
    patches = input_patches(graph.nodes[site], layer, kept[source])
    rows = to_canonical(layer, params[layer.weight])
    rows = rows.reshape(layer.groups, -1, layer.weights_per_channel)
    found = torch.einsum("gpn,grn->grp", patches, rows).flatten(0, 1)
    found = found + params[layer.bias][:, None]
    wanted = kept[site].movedim(1, 0).flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["auto", "mid_tread", "mid_rise", "affine"])
@pytest.mark.parametrize("width", [1, 1.6, 2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_every_width_and_scheme_is_improved(network, name, width, scheme):
    traced, calibration, moments, _ = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    layer = traced.graph.layer_of[name]
    before = bank.layer(name, LayerQuant((width,), scheme))
    after, _ = round_layer(layer, before, traced.params[layer.weight], moments[name], refits=0)
    assert {w: s.ratio.tolist() for w, s in after.scales.items()} == {
        w: s.ratio.tolist() for w, s in before.scales.items()
    }
    errors = [layer_error(traced, moments, name, q) for q in (before, after)]
    assert errors[1] <= errors[0] * 1.001
    refit, _ = round_layer(layer, before, traced.params[layer.weight], moments[name])
    assert layer_error(traced, moments, name, refit) <= errors[1] + 1e-3 * errors[0]


def layer_error(traced, moments, name, quantized) -> float:
    layer = traced.graph.layer_of[name]
    shape = (layer.groups, -1, layer.weights_per_channel)
    values = to_canonical(layer, quantized.weight(layer)).double().reshape(shape)
    weights = to_canonical(layer, traced.params[layer.weight]).double().reshape(shape)
    return float(output_error(weights, values, moments[name].covariance).sum())


def test_pruned_channels_stay_untouched_and_mixed_widths_work(network):
    traced, calibration, moments, _ = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    candidate = Candidate.of({"0": LayerQuant((0, 1, 1.6, 2, 3, 4, 8, 0)), "2": 2, "10": 3})
    before = bank.quantize(candidate)
    after = round_model(before, traced.params, moments, calibration)
    assert after.candidate == before.candidate
    assert not after.layers["0"].codes[[0, 7]].any()
    assert after.layers["0"].bias.values[[0, 7]].tolist() == [0, 0]
    sizes = [PackedModel.from_model(m).size_bytes for m in (before, after)]
    assert sizes[0] == sizes[1]


def test_a_bank_with_moments_rounds_by_them(network):
    traced, calibration, moments, _ = network
    plain = WeightBank(traced.graph, traced.params, calibration)
    second_order = WeightBank(traced.graph, traced.params, calibration, moments=moments)
    mixed = LayerQuant((2, 2, 3, 3, 1, 1.6, 4, 0))
    for name, quant in (("0", LayerQuant((2,))), ("2", mixed), ("4", LayerQuant((3,), "affine"))):
        candidate = Candidate.of({name: quant})
        errors = [
            layer_error(traced, moments, name, bank.quantize(candidate).layers[name])
            for bank in (plain, second_order)
        ]
        assert errors[1] < errors[0]
        weight = traced.graph.layer_of[name].weight
        assert torch.equal(
            second_order.params(candidate)[weight],
            second_order.quantize(candidate).params()[weight],
        )


def test_codes_survive_a_round_trip_through_the_grid(network):
    traced, calibration, _, _ = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    for quant in (LayerQuant((3,), "affine", 6), LayerQuant((2,) * 4 + (5,) * 4, "mid_rise")):
        quantized = bank.layer("2", quant)
        layer = traced.graph.layer_of["2"]
        again = with_codes(quantized, signed_codes(quantized))
        assert np.array_equal(again.codes, quantized.codes)
        shape = (layer.groups, -1, layer.weights_per_channel)
        values = grid_of(layer, quantized).values(signed_codes(quantized).reshape(shape))
        weight = to_canonical(layer, quantized.weight(layer)).double().reshape(shape)
        torch.testing.assert_close(values, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_lowers_the_error_of_the_layer_on_data(network, name):
    traced, calibration, moments, batches = network
    bank = WeightBank(traced.graph, traced.params, calibration)
    before = bank.quantize(Candidate.of({name: 2}))
    after = round_model(before, traced.params, moments, calibration)
    site = traced.graph.layer_of[name].sites[0]
    executor = Executor(traced.graph)
    wanted, plain, rounded = (
        executor.run(params, batches[0][0], keep=(site,))[1][site]
        for params in (traced.params, before.params(), after.params())
    )
    assert (rounded - wanted).norm() < (plain - wanted).norm()


def test_moments_without_data_are_an_error(network):
    traced, _, _, _ = network
    with pytest.raises(ValueError, match="at least one batch"):
        collect_moments(traced.graph, traced.params, [])


def test_second_moment_is_covariance_and_mean():
    covariance, mean = torch.eye(2, dtype=torch.float64)[None], torch.ones(1, 2).double()
    found = InputMoments(covariance, mean).second
    assert found.tolist() == [[[2, 1], [1, 2]]]


def test_moments_are_those_of_the_patches(network):
    traced, _, moments, batches = network
    layer = traced.graph.layer_of["0"]
    patches = input_patches(traced.graph.nodes[layer.sites[0]], layer, batches[0][0][0])[0].double()
    torch.testing.assert_close(moments["0"].mean[0], patches.mean(0), rtol=1e-4, atol=1e-5)
    second = patches.T @ patches / len(patches)
    torch.testing.assert_close(moments["0"].second[0], second, rtol=1e-4, atol=1e-5)
