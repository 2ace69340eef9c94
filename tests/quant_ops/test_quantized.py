import numpy as np
import pytest
import torch

from quant_ops.graph import Layer
from quant_ops.quantized import ActivationQuant, QuantizedLayer, code_range
from quant_ops.stored import StoredBias, StoredScale


def layer_of(shape, kind="conv", groups=1):
    out = shape[1] * groups if kind == "conv_transpose" else shape[0]
    return Layer("c", kind, "c.weight", "c.bias", (1,), shape, out, groups, 0)


def scale_of(values):
    return StoredScale.nearest(np.array(values))


@pytest.fixture
def mixed():
    """Four channels of three weights: 4 bits, pruned, binary (mid-rise), ternary."""
    return QuantizedLayer(
        bit_widths=(4, 0, 1, 1.6),
        codes=np.array([[-8, 0, 7], [0, 0, 0], [-1, 0, 0], [-1, 0, 1]], np.int16),
        scales={4: scale_of([[0.5]]), 1: scale_of([[2.0]]), 1.6: scale_of([[0.25]])},
        mid_rise=frozenset({1}),
        zero_points=None,
        bias=StoredBias.nearest(np.array([1.0, 2.0, 3.0, 4.0])),
    )


def test_values_are_scales_times_codes_with_half_a_step_where_it_says_so(mixed):
    weight = mixed.weight(layer_of((4, 3, 1, 1))).reshape(4, 3)
    wanted = [[-4, 0, 3.5], [0, 0, 0], [-1, 1, 1], [-0.25, 0, 0.25]]
    torch.testing.assert_close(weight, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_a_pruned_channel_has_neither_scale_nor_bias(mixed):
    assert mixed.channel_scales()[1] == 0
    assert mixed.bias_values()[1] == 0
    torch.testing.assert_close(
        mixed.bias_values()[[0, 2, 3]], torch.tensor([1.0, 3.0, 4.0]), rtol=0, atol=1e-4
    )


def test_doubled_codes_are_whole_for_every_scheme(mixed):
    wanted = [[-16, 0, 14], [0, 0, 0], [-1, 1, 1], [-2, 0, 2]]
    assert mixed.doubled_codes().tolist() == wanted


def test_zero_points_and_groups_of_inputs():
    quantized = QuantizedLayer(
        bit_widths=(2,) * 2,
        codes=np.array([[0, 1, 2, 3], [3, 3, 0, 0]], np.int16),
        scales={2: scale_of([[1.0, 0.5], [1.0, 1.0]])},
        mid_rise=frozenset(),
        zero_points=np.array([[1, 2], [0, 3]], np.int16),
        bias=None,
    )
    weight = quantized.weight(layer_of((2, 4), "linear"))
    wanted = [[-1, 0, 0, 0.5], [3, 3, -3, -3]]
    torch.testing.assert_close(weight, torch.tensor(wanted), rtol=1e-6, atol=0)
    assert quantized.bias_values() is None


def test_a_transposed_convolution_is_stored_output_first():
    codes = np.arange(2 * 3, dtype=np.int16).reshape(2, 3)
    quantized = QuantizedLayer(
        (8, 8), codes, {8: scale_of([[1.0], [1.0]])}, frozenset(), None, None
    )
    weight = quantized.weight(layer_of((3, 2, 1), "conv_transpose"))
    assert weight.shape == (3, 2, 1)
    torch.testing.assert_close(weight[:, :, 0], torch.tensor(codes.T).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bit_width", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_fake_quantized_activations_are_the_nearest_of_all_levels(bit_width, signed):
    quant = ActivationQuant(bit_width, signed, 0.25, 0 if signed else 3)
    low, high = quant.code_range
    assert high - low == 2**bit_width - 1
    levels = 0.25 * (torch.arange(low, high + 1) - quant.zero_point)
    x = torch.linspace(-40, 40, 1001)
    nearest = (x[:, None] - levels).abs().min(dim=1).values
    torch.testing.assert_close((quant.fake_quantize(x) - x).abs(), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 1.6, 2, 3, 4, 5, 6, 7, 8])
def test_code_ranges_have_as_many_codes_as_levels(width):
    levels = 3 if width == 1.6 else 2 ** int(width)
    for scheme in ("mid_tread", "mid_rise", "affine"):
        low, high = code_range(width, scheme)
        assert high - low + 1 == levels
