"""Two low-bit tensors whose sum stands for one: closed forms, brute force, never a step back."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import with_residuals
from quant_ops.dual_codes import alternate, channel_errors, nested, rows_of, sum_codes
from quant_ops.rounding import grid_of
from search.capture import trace

WIDTHS = (1, 1.6, 2, 3, 4)


@cache
def linear_graph(out_channels, in_channels):
    """One linear layer with a residual beside it."""
    model = torch.nn.Sequential(torch.nn.Linear(in_channels, out_channels))
    traced = trace(model, (torch.zeros(2, in_channels),))
    return with_residuals(traced.graph, traced.params, ["0"])


def layer_and_bank(weights, **options):
    """A linear layer of these weights, no calibration."""
    graph, params = linear_graph(*weights.shape)
    params = {**params, "0.weight": weights}
    return graph.layer_of["0"], WeightBank(graph, params, None, **options)


def greedy_start(bank, layer, widths):
    """The layer alone, and its residual by the range setter: through a bank of what is left."""
    first = replace(bank.layer(layer.name, LayerQuant((widths[0],))), bias=None)
    left = (bank.weights(layer).double() - rows_of(layer, first)).float()
    other, others = layer_and_bank(left)
    return first, replace(others.layer(other.name, LayerQuant((widths[1],))), bias=None)


def values_at(layer, quantized, row):
    """Every value that a weight of a row can take."""
    grid = grid_of(layer, quantized)
    low, high, offset, scale = (
        float(x.reshape(-1, 1).expand(layer.out_channels, 1)[row, 0])
        for x in (grid.low, grid.high, grid.offset, grid.scale)
    )
    return scale * (np.arange(low, high + 1) + offset)


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 12, generator=generator) ** draw(st.sampled_from([1, 3]))
    importance = torch.rand(1, 12, generator=generator) if draw(st.booleans()) else None
    return weights, importance, draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_alternating_raises_no_channels_error(problem):
    weights, importance, *widths = problem
    layer, bank = layer_and_bank(weights)
    start = greedy_start(bank, layer, widths)
    before = channel_errors(layer, start, weights, importance)
    after = channel_errors(layer, alternate(layer, start, weights, importance), weights, importance)
    assert bool((after <= before * (1 + 1e-6)).all())


@settings(max_examples=10, deadline=None)
@given(problems())
def test_codes_are_the_best_of_all_sums(problem):
    weights, importance, *widths = problem
    layer, bank = layer_and_bank(weights)
    start = greedy_start(bank, layer, widths)
    two = sum_codes(layer, start, weights, importance, "auto")
    found = sum(rows_of(layer, q) for q in two)
    for row in range(len(weights)):
        first, second = (values_at(layer, q, row) for q in two)
        sums = np.array([a + b for a, b in product(first, second)])
        for value, wanted in zip(found[row].tolist(), weights[row].tolist(), strict=True):
            assert abs(value - wanted) <= np.abs(sums - wanted).min() + 1e-6


@pytest.mark.parametrize("bit_width", WIDTHS)
def test_two_tensors_beat_one_of_the_same_width(bit_width):
    weights = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    layer, bank = layer_and_bank(weights)
    alone = bank.quantize(Candidate.of({"0": bit_width})).layers["0"]
    two = bank.quantize(Candidate.of({"0": bit_width, "0.residual": bit_width})).layers
    summed = channel_errors(layer, (two["0"], two["0.residual"]), weights)
    single = (weights - rows_of(layer, alone)).square().sum(dim=1)
    assert bool((summed < 0.6 * single).all())


@pytest.mark.parametrize("widths", [(2, 2), (3, 1), (2, 1), (3, 2)])
def test_two_tensors_are_no_worse_than_one_of_as_many_bits(widths):
    weights = torch.randn(8, 200, generator=torch.Generator().manual_seed(2))
    layer, bank = layer_and_bank(weights, range_setter="mse")
    alone = bank.quantize(Candidate.of({"0": sum(widths)})).layers["0"]
    two = bank.quantize(Candidate.of({"0": widths[0], "0.residual": widths[1]})).layers
    summed = float(channel_errors(layer, (two["0"], two["0.residual"]), weights).sum())
    assert summed <= 1.02 * float((weights - rows_of(layer, alone)).square().sum())


@pytest.mark.parametrize("widths", [(2, 2), (1, 1), (3, 1), (1.6, 1.6), (2, 1.6), (1.6, 2)])
@pytest.mark.parametrize("scheme", ["auto", "mid_tread"])
def test_a_nested_start_is_one_fine_uniform_quantizer(widths, scheme):
    weights = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    layer, bank = layer_and_bank(weights)
    two = nested(layer, greedy_start(bank, layer, widths), weights, None, scheme)
    for row in range(4):
        first, second = (values_at(layer, q, row) for q in two)
        sums = np.sort([a + b for a, b in product(first, second)])
        steps = np.diff(sums)
        assert steps == pytest.approx(steps[0], rel=1e-5)
