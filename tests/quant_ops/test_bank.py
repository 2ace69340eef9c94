"""Cached quantization equals fresh quantization, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quant_ops.bank
from quant_ops.bank import WeightBank
from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.calibration import calibrate
from quant_ops.candidate import SCHEMES, Candidate, LayerQuant
from quant_ops.executor import Executor
from quant_ops.layout import to_canonical
from quant_ops.quantized import code_range
from quant_ops.quantizers import fake_quantize
from search.capture import trace


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose1d(8, 6, 4, groups=2)
        self.last = nn.Linear(6, 5)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.embed(tokens).transpose(1, 2)))
        x = torch.relu(self.up(torch.relu(self.depthwise(x))))
        return self.last(x.mean(2))


NAMES = ("embed", "conv", "depthwise", "up", "last")


def make_network():
    torch.manual_seed(1)
    tokens = torch.randint(0, 11, (16, 9))
    traced = trace(Mixed().eval(), (tokens,))
    edges = {n.name: i for i, n in enumerate(traced.graph.nodes) if n.op == "relu.default"}
    return traced, calibrate(traced.graph, traced.params, [((tokens,), None)], edges=edges), tokens


TRACED, CALIBRATION, TOKENS = make_network()


def bank(**settings):
    return WeightBank(TRACED.graph, TRACED.params, CALIBRATION, **settings)


def layer_quants(out_channels):
    width = st.sampled_from(BIT_WIDTHS)
    widths = width.map(lambda w: (w,)) | st.lists(
        width, min_size=out_channels, max_size=out_channels
    ).map(tuple)
    return st.builds(LayerQuant, widths, st.sampled_from(SCHEMES), st.sampled_from([None, 2]))


candidates = st.fixed_dictionaries(
    {name: layer_quants(TRACED.graph.layer_of[name].out_channels) for name in NAMES}
).map(Candidate.of)
SHARED_BANK = bank()


@settings(max_examples=40, deadline=None)
@given(candidates)
def test_cached_parameters_equal_the_quantized_model(candidate):
    params = SHARED_BANK.params(candidate)
    fresh = bank().quantize(candidate)
    expected = fresh.params()
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name], expected[name]) for name in expected)
    again = SHARED_BANK.params(candidate)
    assert all(again[name] is params[name] for name in params)


@settings(max_examples=40, deadline=None)
@given(candidates)
def test_codes_are_legal_and_rows_of_width_zero_are_zero(candidate):
    model = SHARED_BANK.quantize(candidate)
    for name, layer in model.layers.items():
        scheme = candidate.assignment[name].scheme
        widths = np.asarray(layer.bit_widths)
        assert (layer.zero_points is not None) == (scheme == "affine")
        assert set(layer.scales) == set(layer.bit_widths) - {0}
        for width in layer.scales:
            low, high = code_range(width, "affine" if scheme == "affine" else "mid_rise")
            rows = layer.codes[widths == width]
            assert rows.min() >= low
            assert rows.max() <= high
            if layer.zero_points is not None:
                zeros = layer.zero_points[widths == width]
                assert zeros.min() >= low
                assert zeros.max() <= high
        assert not layer.codes[widths == 0].any()
        bias = layer.bias_values()
        assert (bias is None) == (name == "embed")
        if bias is not None:
            assert not bias[torch.from_numpy(widths == 0)].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_widths_of_others(name, scheme):
    layer = TRACED.graph.layer_of[name]
    mixed = tuple(BIT_WIDTHS[1 + i % 9] for i in range(layer.out_channels))
    found = bank().layer(name, LayerQuant(mixed, scheme)).weight(layer)
    for channel, width in enumerate(mixed):
        alone = bank().layer(name, LayerQuant((width,), scheme)).weight(layer)
        assert torch.equal(to_canonical(layer, found)[channel], to_canonical(layer, alone)[channel])


@pytest.mark.parametrize("bit_width", BIT_WIDTHS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [None, 3])
def test_weights_are_fake_quantized_with_the_stored_scales(bit_width, scheme, group_size):
    quant = LayerQuant((bit_width,), scheme, group_size)
    layer = TRACED.graph.layer_of["conv"]
    found = bank().layer("conv", quant)
    scales = torch.from_numpy(found.scales[bit_width].values)[:, :, None]
    zero = None
    kind = "mid_rise" if bit_width in found.mid_rise else "mid_tread"
    if found.zero_points is not None and bit_width >= 2:
        kind, zero = "affine", torch.from_numpy(found.zero_points).long()[:, :, None]
    grouped = TRACED.params[layer.weight].reshape(*scales.shape[:2], -1)
    expected = fake_quantize(grouped, scales, bit_width, kind, zero)
    assert torch.equal(found.weight(layer), expected.reshape(layer.weight_shape))


def test_binary_is_mid_rise_and_ternary_is_not():
    for scheme in SCHEMES:
        assert bank().layer("conv", LayerQuant((1,), scheme)).mid_rise == {1}
        assert bank().layer("conv", LayerQuant((1.6,), scheme)).mid_rise == frozenset()


@pytest.mark.parametrize("bit_width", [2, 3, 5, 8])
def test_auto_takes_the_scheme_of_the_smaller_input_weighted_error(bit_width):
    layer = TRACED.graph.layer_of["conv"]
    square = CALIBRATION.input_square["conv"][:, None]

    def error(scheme):
        weight = bank().layer("conv", LayerQuant((bit_width,), scheme)).weight(layer)
        return float(((weight - TRACED.params[layer.weight]).square() * square).sum())

    assert error("auto") == pytest.approx(min(error("mid_tread"), error("mid_rise")), rel=1e-5)


def test_removed_inputs_move_into_the_bias():
    layer = TRACED.graph.layer_of["last"]
    live = np.array([True, False, True, True, False, True])
    quant = LayerQuant((8,))
    full, cut = (bank().layer("last", quant, mask) for mask in (None, live))
    gone = torch.from_numpy(~live)
    mean = CALIBRATION.input_mean["last"]
    expected = full.bias_values() + (full.weight(layer) * mean * gone).sum(1)
    torch.testing.assert_close(cut.bias_values(), expected, rtol=1e-3, atol=1e-4)
    assert np.array_equal(full.codes, cut.codes)
    assert bank().layer("last", quant, np.ones(6, bool)).bias.base == full.bias.base


def test_eight_bits_hardly_change_the_outputs():
    candidate = Candidate.of(dict.fromkeys(NAMES, 8))
    (wanted,), (found,) = (
        Executor(TRACED.graph)(p, (TOKENS,)) for p in (TRACED.params, bank().params(candidate))
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.std()))


def test_activations_come_from_the_calibrated_edges():
    model = bank().quantize(Candidate.of({"conv": 4}, {"relu": 4, "relu_1": 8}))
    assert {n: a.bit_width for n, a in model.activations.items()} == {"relu": 4, "relu_1": 8}
    with pytest.raises(ValueError, match="'nowhere'"):
        bank().quantize(Candidate.of({}, {"nowhere": 8}))


def test_layers_out_of_the_candidate_stay_float():
    model = bank().quantize(Candidate.of({"conv": 4}))
    assert set(model.float_params) == set(TRACED.params) - {"conv.weight", "conv.bias"}


def test_forgotten_entries_are_computed_again_the_same():
    small, large = bank(memory_bytes=2000), bank()
    for _ in range(2):
        for width in BIT_WIDTHS[1:]:
            candidate = Candidate.of(dict.fromkeys(NAMES, width))
            found, expected = small.params(candidate), large.params(candidate)
            assert all(torch.equal(found[n], expected[n]) for n in expected)
    cache = quant_ops.bank._ByteCache(10)
    for key in "abc":
        cache.get(key, lambda: b"1234", len)
    assert list(cache._entries) == ["b", "c"]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'median'"):
        bank(range_setter="median")
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        bank().params(Candidate.of({"nowhere": 4}))
    broken = {**TRACED.params, "conv.weight": TRACED.params["conv.weight"] * float("nan")}
    with pytest.raises(ValueError, match="'conv' has NaN"):
        WeightBank(TRACED.graph, broken, CALIBRATION).params(Candidate.of({"conv": 4}))


@pytest.mark.parametrize("name", ["conv", "depthwise", "up"])
@pytest.mark.parametrize("group_size", [None, 2])
def test_weighted_setter_lowers_the_weighted_error(name, group_size):
    layer = TRACED.graph.layer_of[name]
    square = CALIBRATION.input_square[name].reshape(layer.groups, 1, -1, 1)
    wanted = to_canonical(layer, TRACED.params[layer.weight])

    def error(setter):
        quant = LayerQuant((3,), "mid_rise", group_size)
        found = to_canonical(layer, bank(range_setter=setter).layer(name, quant).weight(layer))
        change = (found - wanted).reshape(layer.groups, -1, *wanted.shape[1:])
        return float((change.square() * square).sum())

    assert error("weighted_mse") <= 1.001 * error("mse")
