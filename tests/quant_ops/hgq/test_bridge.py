import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.graph import Layer
from quant_ops.hgq.bridge import activation_quant, candidate_widths, quantized_layer
from quant_ops.hgq.fixed_point import Arithmetic
from quant_ops.hgq.layers import HGQConv2d, HGQLinear, LayerSpecs
from quant_ops.hgq.quantizer import KIFQuantizer, QuantizerSpec
from quant_ops.packed import pack, read
from quant_ops.quantized import QuantizedModel
from search.capture import trace

BIAS = QuantizerSpec("kbi", most_bits=12)


def weights(granularity, most_bits=7):
    symmetric = Arithmetic("RND", "SAT_SYM")
    return QuantizerSpec("kbi", True, 1, 5, symmetric, granularity, most_bits=most_bits)


def layer_of(shape, kind="conv"):
    return Layer("c", kind, "c.weight", "c.bias", (1,), shape, shape[0], 1, 0)


def conv_with(granularity, seed=0):
    torch.manual_seed(seed)
    conv = HGQConv2d(
        3, 9, 3, specs=LayerSpecs(weights(granularity), QuantizerSpec(granularity="tensor"), BIAS)
    )
    quantizer = conv.weight_quantizer
    with torch.no_grad():
        bits = torch.randint(0, 8, quantizer.shape).float()
        quantizer.total_bits.copy_(bits)
        quantizer.integer_bits.copy_(-torch.randint(0, 3, quantizer.shape).float())
        conv.bias.uniform_(-1, 1)
    return conv


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("seed", range(5))
def test_stored_weights_and_biases_are_those_of_inference(granularity, seed):
    conv = conv_with(granularity, seed)
    stored = quantized_layer(conv)
    assert torch.equal(stored.weight(layer_of((9, 3, 3, 3))), conv.quantized_weight())
    alive = np.asarray(stored.bit_widths) > 0
    assert torch.equal(stored.bias_values()[alive], conv.quantized_bias().detach()[alive])


def test_a_channel_of_any_magnitude_bits_needs_one_more_for_the_sign():
    conv = conv_with("channel")
    with torch.no_grad():
        conv.weight_quantizer.total_bits.copy_(torch.arange(9.0).clamp_max(7).reshape(9, 1, 1, 1))
        conv.weight_quantizer.integer_bits.fill_(0)
        conv.weight.copy_(torch.linspace(-1, 1, 27).reshape(1, 3, 3, 3).expand(9, 3, 3, 3))
    assert quantized_layer(conv).bit_widths == (0, 1.6, 3, 4, 5, 6, 7, 8, 8)
    assert candidate_widths(conv) == (0, 2, 3, 4, 5, 6, 7, 8, 8)


def test_with_widths_per_weight_the_widest_decides():
    linear = HGQLinear(3, 2, specs=LayerSpecs(weights("element")))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, 0.25, 0.0625], [0.5, -1.0, 0.0]]))
        linear.weight_quantizer.integer_bits.fill_(1)
        linear.weight_quantizer.total_bits.copy_(torch.tensor([[2.0, 4, 6], [3, 3, 0]]))
    stored = quantized_layer(linear)
    assert stored.bit_widths == (5, 2)  # 8, 4, 1 sixteenths; 1, -2, 0 halves
    assert torch.equal(stored.weight(layer_of((2, 3), "linear")), linear.quantized_weight())
    assert candidate_widths(linear) == (7, 4)


def test_what_does_not_fit_eight_bits_is_refused_with_its_place():
    linear = HGQLinear(2, 1, specs=LayerSpecs(weights("element", 20)))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0**-9]]))
        linear.weight_quantizer.total_bits.fill_(15)
        linear.weight_quantizer.integer_bits.fill_(1)
    with pytest.raises(ValueError, match=r"fc, channel 0: .*8 bits or less \(codes from 1 to 512"):
        quantized_layer(linear, name="fc")


@pytest.mark.parametrize(("octaves", "fits"), [(15, True), (16, False)])
def test_scales_of_one_width_span_fifteen_octaves(octaves, fits):
    linear = HGQLinear(1, 2, bias=False, specs=LayerSpecs(weights("channel", 23)))
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [2.0**-octaves]]))
        linear.weight_quantizer.total_bits.fill_(20)
        linear.weight_quantizer.integer_bits.fill_(1)
    if not fits:
        with pytest.raises(ValueError, match="15 octaves"):
            quantized_layer(linear)
        return
    stored = quantized_layer(linear)
    assert torch.equal(stored.weight(layer_of((2, 1), "linear")), linear.quantized_weight())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [(2, 3), (0, 7), (-1, 4), (5, -2)])
def test_activation_quantizers_are_equal_on_a_grid(signed, bits):
    spec = QuantizerSpec("kif", signed, *bits, Arithmetic("RND_CONV", "SAT"), "tensor")
    quantizer = KIFQuantizer((1, 1), spec).eval()
    x = torch.arange(-4096, 4097)[None] / 128
    assert torch.equal(activation_quant(quantizer).fake_quantize(x), quantizer(x))


def test_activations_that_no_packed_file_computes_are_refused():
    with pytest.raises(ValueError, match='granularity "tensor"'):
        activation_quant(KIFQuantizer((1, 4)))
    with pytest.raises(ValueError, match="RND_CONV and saturate by SAT, not RND and WRAP"):
        activation_quant(KIFQuantizer((1, 1)))


def test_a_trained_network_survives_the_packed_file():
    torch.manual_seed(0)
    specs = LayerSpecs(weights("channel"), QuantizerSpec(granularity="tensor"), BIAS)
    model = nn.Sequential(HGQLinear(8, 6, specs=specs), nn.ReLU(), HGQLinear(6, 3, specs=specs))
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    traced = trace(plain, (torch.randn(2, 8),))
    layers = {name: quantized_layer(model[int(name)], name=name) for name in ("0", "2")}
    candidate = Candidate.of(
        {n: LayerQuant(layer.bit_widths, "mid_tread") for n, layer in layers.items()}
    )
    quantized = QuantizedModel(traced.graph, candidate, layers, {}, {})
    loaded = read(pack(quantized))
    for (name, layer), mine in zip(loaded.layers.items(), model[::2], strict=True):
        weight = layer.weight(loaded.graph.layer_of[name])
        assert torch.equal(weight, mine.quantized_weight())
        assert torch.equal(layer.bias_values(), mine.quantized_bias())
