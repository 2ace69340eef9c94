"""HGQ2 0.2.0 is the oracle: same results, gradients and EBOPs for every mode it accepts."""

import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.hgq.fixed_point import OVERFLOWS, ROUNDINGS, Arithmetic
from quant_ops.hgq.layers import HGQConv1d, HGQConv2d, HGQLinear, LayerSpecs
from quant_ops.hgq.quantizer import KBIQuantizer, KIFQuantizer, QuantizerSpec
from quant_ops.hgq.totals import trace_ranges

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of keras and of HGQ2
]
os.environ["KERAS_BACKEND"] = "torch"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend in this process", allow_module_level=True)
    hgq = pytest.importorskip("hgq", reason="HGQ2 is not installed")
    from hgq.config import QuantizerConfig
    from hgq.layers import QConv1D, QConv2D, QDense
    from hgq.quantizer import Quantizer
    from hgq.utils import trace_minmax

PAIRS = [
    (rounding, overflow)
    for rounding in ROUNDINGS
    for overflow in OVERFLOWS
    if overflow != "WRAP_SM" or rounding in ("RND", "RND_CONV")
]
BITS = [(1, 2, 3), (0, 2, 3), (1, 0, 4), (1, -1, 3), (0, 3, -1), (1, 3, -3), (1, 1, -3), (0, 0, 0)]
GRID = torch.arange(-12 * 64, 12 * 64 + 1) / 64


def theirs(form, rounding, overflow, *, is_weight=False, axes=()):
    place = "weight" if is_weight else "datalane"
    modes = {"round_mode": rounding, "overflow_mode": overflow}
    second = {"f0": 0} if form == "kif" else {"b0": 0}
    return Quantizer(
        QuantizerConfig(form, place, k0=1, i0=0, **second, **modes, heterogeneous_axis=axes)
    )


def numbers(variable):
    return torch.as_tensor(keras.ops.convert_to_numpy(variable), dtype=torch.float32)


class Pair:
    """One quantizer of each side with the same bits."""

    def __init__(self, form, bits, rounding, overflow, *, is_weight=False, shape=(), data=(1,)):
        signed, integer, fraction = (np.broadcast_to(b, shape or (1,) * len(data)) for b in bits)
        spec = QuantizerSpec(form, arithmetic=Arithmetic(rounding, overflow))
        self.ours = spec.make(signed.shape, is_weight=is_weight)
        axes = [a for a, n in enumerate(signed.shape) if n > 1]
        self.theirs = theirs(form, rounding, overflow, is_weight=is_weight, axes=axes)
        self.theirs.build(data)
        inner = self.theirs.quantizer
        inner._k.assign(signed.astype("uint8"))
        inner._i.assign(integer.astype("float32"))
        second = inner._f if form == "kif" else inner._b
        second.assign((fraction if form == "kif" else integer + fraction).astype("float32"))
        ours = self.ours.fraction_bits if form == "kif" else self.ours.total_bits
        with torch.no_grad():
            self.ours.signed.copy_(numbers(inner._k))
            self.ours.integer_bits.copy_(numbers(inner._i))
            ours.copy_(numbers(second))
        self.second = (ours, second)


@pytest.mark.parametrize("form", ["kif", "kbi"])
@pytest.mark.parametrize(("rounding", "overflow"), PAIRS)
def test_inference_is_equal_on_a_dense_grid(form, rounding, overflow):
    for bits in BITS:
        if form == "kbi" and bits[1] + bits[2] < 0:
            continue
        for is_weight in (False, True):
            pair = Pair(form, bits, rounding, overflow, is_weight=is_weight, data=GRID.shape)
            ours = pair.ours.eval()(GRID)
            assert torch.equal(ours, pair.theirs(GRID, training=False).detach()), (bits, is_weight)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_stochastic_names_round_like_the_plain_ones(rounding):
    pair = Pair("kif", (1, 2, 3), "S_" + rounding, "SAT", data=GRID.shape)
    for training in (False, True):
        ours = pair.ours.train(training)(GRID)
        assert torch.equal(ours, pair.theirs(GRID, training=training))


def gradients(pair, x, upstream):
    ours_x = x.clone().requires_grad_()
    y = pair.ours.train()(ours_x)
    learned = [p for p in pair.ours.parameters()]
    (y * upstream).sum().backward()
    ours = [y.detach(), ours_x.grad, *[p.grad for p in learned]]
    their_x = x.clone().requires_grad_()
    y = pair.theirs(their_x, training=True)
    (y * upstream).sum().backward()
    inner = pair.theirs.quantizer
    by_id = {id(pair.ours.integer_bits): inner._i, id(pair.second[0]): pair.second[1]}
    return ours, [y.detach(), their_x.grad, *[by_id[id(p)].value.grad for p in learned]]


@pytest.mark.parametrize("form", ["kif", "kbi"])
@pytest.mark.parametrize(("rounding", "overflow"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 5)], ids=["tensor", "channel", "element"])
def test_training_results_and_gradients_are_equal(form, rounding, overflow, shape):
    generator = np.random.default_rng(0)
    bits = (
        generator.integers(0, 2, shape),
        generator.uniform(-2, 3, shape),
        generator.uniform(0, 4, shape),
    )
    if form == "kbi":
        bits = (bits[0], bits[1], np.maximum(bits[2], -bits[1]))
    pair = Pair(form, bits, rounding, overflow, shape=shape, data=(7, 5))
    x = torch.tensor(generator.normal(0, 3, (7, 5)), dtype=torch.float32)
    x[0, 0], x[1, 1], x[2, 2] = 0.0, 0.5, -0.25
    upstream = torch.tensor(generator.normal(size=(7, 5)), dtype=torch.float32)
    for ours, wanted in zip(*gradients(pair, x, upstream), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    inner = pair.theirs.quantizer
    assert torch.equal(pair.ours.integer_bits.detach(), numbers(inner._i))
    torch.testing.assert_close(pair.ours.bit_widths().detach(), numbers(inner.bits))
    ours = pair.ours.eval()(x).detach()
    assert torch.equal(ours, pair.theirs(x, training=False).detach())
    assert torch.equal(ours * 2.0**26, torch.round(ours * 2.0**26))  # dyadic


def copy_widths(ours, theirs_quantizer):
    inner = theirs_quantizer.quantizer
    with torch.no_grad():
        for name, mine in (
            ("_k", ours.signed),
            ("_i", ours.integer_bits),
            ("_f", getattr(ours, "fraction_bits", None)),
            ("_b", getattr(ours, "total_bits", None)),
        ):
            if mine is not None:
                mine.copy_(as_ours(numbers(getattr(inner, name)), mine.shape))


def as_ours(values, shape):
    """Kernels (..., in, out) as (out, in, ...), data (1, ..., channels) as (1, channels, ...)."""
    if values.numel() == max(values.shape, default=1):
        return values.reshape(shape)
    if values.dim() == 2:
        return values.T
    return values.permute(values.dim() - 1, values.dim() - 2, *range(values.dim() - 2))


def test_the_table_of_the_reference_is_met():
    kernel = np.array([[0.5, -0.25, 0.375], [0, 0.875, -0.625]], "float32")
    rows = {(1, 3, 4, 0, 3): 91, (0, 3, 3, 0, 3): 78, (1, 2, 5, 1, 4): 126, (1, 3, 4, 0, 7): 231}
    for (signed, integer, fraction, w_integer, w_fraction), wanted in rows.items():
        x = QuantizerSpec(
            "kif", bool(signed), integer, fraction, Arithmetic("RND", "SAT_SYM"), "tensor"
        )
        w = QuantizerSpec("kif", True, w_integer, w_fraction, Arithmetic("RND", "WRAP"))
        layer = HGQLinear(2, 3, bias=False, specs=LayerSpecs(w, x))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.T))
        layer.weight_quantizer.integer_decay = float("inf")
        layer.train()(torch.zeros(1, 2))
        assert float(layer.ebops) == wanted


@pytest.mark.parametrize("overflow", ["WRAP", "SAT", "SAT_SYM"])
@pytest.mark.parametrize("sequence", [(), (5,)], ids=["flat", "sequence"])
def test_ebops_of_dense_layers_and_their_gradients_are_equal(overflow, sequence):
    data = torch.tensor(
        np.random.default_rng(1).normal(size=(4, *sequence, 6)), dtype=torch.float32
    )
    homogeneous = tuple(range(data.dim() - 1))
    dense = QDense(
        3,
        kq_conf=QuantizerConfig("kbi", "weight", overflow_mode=overflow, b0=5, i0=1),
        iq_conf=QuantizerConfig(
            "kif", "datalane", overflow_mode=overflow, homogeneous_axis=homogeneous
        ),
        parallelization_factor=2 if sequence else -1,
    )  # fmt: skip
    dense.build((None, *sequence, 6))
    specs = LayerSpecs(
        QuantizerSpec("kbi", True, 1, 4, Arithmetic("RND", overflow)),
        QuantizerSpec("kif", True, 2, 6, Arithmetic("RND", overflow)),
    )
    linear = HGQLinear(6, 3, specs=specs, parallel=2 if sequence else None)
    with torch.no_grad():
        linear.weight.copy_(numbers(dense._kernel).T)
        linear.bias.copy_(numbers(dense.bias))
    pairs = ((linear.weight_quantizer, dense.kq), (linear.input_quantizer, dense.iq),
             (linear.bias_quantizer, dense.bq))  # fmt: skip
    for mine, other in pairs:
        mine.integer_decay = 0.01
        copy_widths(mine, other)
    linear.weight_quantizer.integer_decay = float("inf")
    y = dense(data, training=True)
    torch.testing.assert_close(linear.train()(data), y, rtol=1e-6, atol=1e-6)
    assert int(linear.ebops) == int(numbers(dense._ebops))
    dense.losses[0].backward()
    (linear.ebops * float(numbers(dense._beta))).backward()
    for mine, other in pairs:
        second = mine.other_bits()
        variable = other.quantizer._f if hasattr(mine, "fraction_bits") else other.quantizer._b
        wanted = as_ours(variable.value.grad, second.shape)
        torch.testing.assert_close(second.grad, wanted, rtol=1e-6, atol=1e-6)


CONVS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "strides": 2},
    "padded": {"kernel_size": 3, "padding": "same"},
    "even": {"kernel_size": 2, "padding": "same"},
    "dilated": {"kernel_size": 3, "dilation_rate": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "reused": {"kernel_size": 3, "parallelization_factor": 3},
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("granularity", ["element", "channel", "tensor"])
@pytest.mark.parametrize("rank", [1, 2])
def test_ebops_of_convolutions_are_equal(name, granularity, rank):
    given = CONVS[name]
    sizes = (7, 6)[:rank]
    data = torch.tensor(np.random.default_rng(2).normal(size=(2, *sizes, 4)), dtype=torch.float32)
    shared = {"element": (0,), "channel": tuple(range(rank + 1)), "tensor": tuple(range(rank + 2))}
    conv = (QConv1D, QConv2D)[rank - 1](
        8, **given, data_format="channels_last",
        iq_conf=QuantizerConfig("kif", "datalane", homogeneous_axis=shared[granularity]),
    )  # fmt: skip
    conv.build((None, *sizes, 4))
    kind = (HGQConv1d, HGQConv2d)[rank - 1]
    ours = kind(
        4,
        8,
        given["kernel_size"],
        stride=given.get("strides", 1),
        padding=given.get("padding", 0),
        dilation=given.get("dilation_rate", 1),
        groups=given.get("groups", 1),
        input_size=sizes,
        specs=LayerSpecs(input=QuantizerSpec("kif", granularity=granularity)),
        parallel=given.get("parallelization_factor"),
    )
    generator = np.random.default_rng(3)
    b = conv.kq.quantizer._b
    b.assign(generator.integers(0, 9, b.shape).astype("float32"))
    with torch.no_grad():
        ours.weight.copy_(as_ours(numbers(conv.kernel), ours.weight.shape))
        ours.bias.copy_(numbers(conv.bias))
        ours.weight_quantizer.total_bits.copy_(as_ours(numbers(b), ours.weight.shape))
    y = conv(data, training=True)
    channels_last = (0, *range(2, rank + 2), 1)
    mine = ours.train()(data.movedim(-1, 1))
    torch.testing.assert_close(mine.permute(channels_last), y, rtol=1e-5, atol=1e-5)
    assert int(ours.ebops.detach()) == int(numbers(conv._ebops))


def test_traced_ranges_and_ebops_of_a_network_are_equal():
    keras.utils.set_random_seed(0)
    theirs = keras.Sequential(
        [keras.Input((6,)), QDense(5, activation="relu"), QDense(4, activation="relu"), QDense(3)]
    )
    model = nn.Sequential(HGQLinear(6, 5), nn.ReLU(), HGQLinear(5, 4), nn.ReLU(), HGQLinear(4, 3))
    generator = np.random.default_rng(0)
    for mine, other in zip(model[::2], theirs.layers, strict=True):
        for quantizer in (other.kq, other.iq, other.bq):
            inner = quantizer.quantizer
            second = inner._f if hasattr(inner, "_f") else inner._b
            second.assign(generator.integers(0, 7, second.shape).astype("float32"))
        with torch.no_grad():
            mine.weight.copy_(numbers(other._kernel).T)
            mine.bias.copy_(numbers(other.bias))
        pairs = ((mine.weight_quantizer, other.kq), (mine.input_quantizer, other.iq),
                 (mine.bias_quantizer, other.bq))  # fmt: skip
        for ours, quantizer in pairs:
            copy_widths(ours, quantizer)
    data = np.random.default_rng(4).normal(size=(64, 6)).astype("float32")
    wanted = trace_minmax(theirs, data, batch_size=32, verbose=0)
    assert trace_ranges(model, torch.tensor(data).split(32)) == wanted
    for mine, other in zip(model[::2], theirs.layers, strict=True):
        assert torch.equal(mine.input_quantizer.signed, numbers(other.iq.quantizer._k))
        assert torch.equal(mine.input_quantizer.integer_bits, numbers(other.iq.quantizer._i))
    ours = model.eval()(torch.tensor(data)).detach()
    torch.testing.assert_close(ours, theirs(data, training=False).detach(), rtol=1e-6, atol=1e-6)


def test_kif_and_kbi_have_the_widths_of_their_spec():
    assert KIFQuantizer((1, 3)).bit_widths().tolist() == [[8, 8, 8]]
    assert KBIQuantizer((1, 1)).bit_widths().tolist() == [[8]]
