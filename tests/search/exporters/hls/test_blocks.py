"""Blocks, before hls4ml is asked: their arithmetic and types give the integers of the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from small_networks import JOINTS, C, Net, calibrated, mlp, random_packed
from torch import nn

from quant_ops.reference import run
from quant_ops.requantize import Rescale
from search.exporters.c.reduced import reduced_program
from search.exporters.hls.rescaling import lanes_of, stages
from search.exporters.hls.translate import translate

MORE = {
    "transposed": Net(
        lambda m, x: m.b(m.a(x)),
        a=C(2, 4, 2),
        b=nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2, output_padding=1),
    ),
    "cropped": Net(lambda m, x: m.a(x), a=nn.ConvTranspose2d(2, 3, 2, padding=2)),
    "three axes": Net(
        lambda m, x: m.a(x.unflatten(3, (2, 2))),
        a=nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
    ),
    "product": Net(
        lambda m, x: (lambda y: m.c(y * m.b(y.mean((2, 3), keepdim=True)).clamp(0, 1)))(m.a(x)),
        a=C(2, 3, 1),
        b=C(3, 3, 1),
        c=C(3, 2, 2),
    ),
    "rows": Net(lambda m, x: m.b(F.relu(m.a(x))).flatten(1), a=nn.Linear(4, 5), b=nn.Linear(5, 2)),
    "maxima": Net(
        lambda m, x: m.b(F.adaptive_max_pool2d(F.max_pool2d(m.a(x), 2, 1, 1), 3)),
        a=C(2, 3, 3, padding=1),
        b=C(3, 2, 3),
    ),
    "dilated and cut maxima": Net(
        lambda m, x: m.b(F.max_pool2d(F.max_pool2d(m.a(x), 2, 1, 0, 2), 2, 2, 0, ceil_mode=True)),
        a=C(2, 3, 2, padding=1),
        b=C(3, 2, 2),
    ),
    "extremes": Net(
        lambda m, x: (lambda y: y.amax((2, 3)) - y.amin((2, 3)) + y.flatten(2).max(2)[0])(m.a(x)),
        a=C(2, 3, 2),
    ),
    "shuffles": Net(
        lambda m, x: m.b(F.pixel_shuffle(F.channel_shuffle(m.a(x), 2), 2)).flip(3),
        a=C(2, 8, 3),
        b=C(2, 2, 1),
    ),
    "expanded": Net(
        lambda m, x: (lambda y: m.b(F.relu(y).mean((2, 3), keepdim=True).expand_as(y)))(m.a(x)),
        a=C(2, 3, 2),
        b=C(3, 2, 2),
    ),
    "upsampled": Net(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="nearest")).flatten(1),
        a=C(2, 3, 3),
        b=C(3, 2, 3),
    ),
    "parts": Net(
        lambda m, x: (lambda a, b: torch.cat([m.b(a), b, a], 2))(*m.a(x).chunk(2, 1)),
        a=C(2, 4, 1),
        b=C(2, 2, 1),
    ),
    "a norm of its own, spread": Net(
        lambda m, x: m.a(F.relu(m.n(x)) + x[:, :1]), n=nn.BatchNorm2d(2), a=C(2, 2, 3)
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*JOINTS, *MORE])
def test_blocks_compute_the_integers_of_the_reference(name, seed):
    torch.manual_seed(seed)
    x = torch.randn(12, 2, 4, 4)
    bits = (2, 4, 8) if seed % 2 else (3, 7)
    net = (JOINTS | MORE)[name]
    packed = random_packed(net, (x,), seed, activation_bits=bits, off_centre=seed / 2)
    reduced = reduced_program(packed.model)
    network = translate(reduced.program, reduced.graph)
    (_, entry), *others = network.inputs
    assert not others
    codes = entry.port.codes.quantize(x.numpy()).reshape(len(x), -1)
    lying = np.empty_like(codes)
    lying[:, entry.places.reshape(-1)] = codes
    found = zip(network.outputs, computed(network, lying.astype(float)), strict=True)
    wanted = run(reduced.program, [x.numpy()]).values
    for ((_, wiring), words), values in zip(found, wanted, strict=True):
        words = words[:, wiring.places.reshape(-1)].astype(np.int64)
        np.testing.assert_array_equal(wiring.port.values(words), values)


def computed(network, codes):
    """What the blocks write for (n, integers) of the only input, each checked against its type."""
    values = {}
    for block in network.blocks:
        sources = [values[name] for name in block.inputs]
        if block.kind == "InputLayer":
            value = codes.reshape(len(codes), *block.attributes["input_shape"])
        else:
            value = KINDS[block.kind](block.attributes, *sources)
        for kind in ("accum", "result"):
            if kind in block.precision:
                value = assigned(value, block.precision[kind])
        values[block.name] = value
    return [values[name].reshape(len(codes), -1) for name, _ in network.outputs]


def windows_of(x, size, stride):
    return sliding_window_view(x, size, (1, 2))[:, :: stride[0], :: stride[1]]


def convolved(a, x):
    kernel = a["weight_data"]
    pads = [(a["pad_top"], a["pad_bottom"]), (a["pad_left"], a["pad_right"])]
    strides = a["stride_height"], a["stride_width"]
    windows = windows_of(np.pad(x, [(0, 0), *pads, (0, 0)]), kernel.shape[:2], strides)
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


def gathered(a, x):
    with_zero = np.pad(x.reshape(len(x), -1), [(0, 0), (0, 1)])
    return with_zero[:, a["positions"]].reshape(len(x), *a["shape"])


def largest(a, x):
    sizes, strides = ((a[f"{k}_height"], a[f"{k}_width"]) for k in ("pool", "stride"))
    return windows_of(x, sizes, strides).max((-1, -2))


KINDS = {
    "Reshape": lambda a, x: x.reshape(len(x), *a["target_shape"]),
    "Gather": gathered,
    "Concatenate": lambda a, *parts: np.concatenate(parts, a["axis"]),
    "Merge": lambda a, x, y: x + y if a["op"] == "Add" else x * y,
    "Activation": lambda a, x: x,
    "ApplyAlpha": lambda a, x: x * a["scale_data"] + a["bias_data"],
    "Dense": lambda a, x: x @ a["weight_data"],
    "Conv2D": convolved,
    "MaxPooling2D": largest,
}


@given(
    limits=st.tuples(st.integers(-300, 300), st.integers(-300, 300)).map(sorted),
    ends=st.tuples(st.integers(-5000, 5000), st.integers(-5000, 5000)).map(sorted),
    multiplier=st.integers(1, 2**20),
    offset=st.integers(-(2**24), 2**24),
    zero_point=st.integers(-128, 255),
)
def test_types_round_and_saturate_as_the_rescaling_does(
    limits, ends, multiplier, offset, zero_point
):
    low, high = (limit + zero_point for limit in limits)
    m, o, n = (np.array([v], np.int64) for v in (multiplier, offset, 16))
    rescale = Rescale((m,), o, n, zero_point, low, high)
    least, most = (np.array([end], np.int64) for end in ends)
    lanes = lanes_of(rescale, np.zeros(1, np.int64), [(least, most)], "sum")
    sums = np.arange(ends[0], ends[1] + 1, max(1, (ends[1] - ends[0]) // 500))
    value = sums.astype(float)
    for stage in stages(lanes):
        value = assigned(value * stage.scale + stage.offset, stage.result)
        assert stage.reach[0] <= value.min()
        assert value.max() <= stage.reach[1]
    np.testing.assert_array_equal(value, rescale(sums) - zero_point)


def assigned(value, fixed):
    """What C++ stores: floor to the last bit, saturate or wrap."""
    words = np.floor(value * 2.0**fixed.fraction)
    low, high = (-(2 ** (fixed.width - 1)), 2 ** (fixed.width - 1) - 1)
    if not fixed.signed:
        low, high = 0, 2**fixed.width - 1
    assert fixed.saturates or ((words >= low) & (words <= high)).all()
    return np.clip(words, low, high) / 2.0**fixed.fraction


@pytest.mark.parametrize(
    ("net", "shape"), [(mlp(), (6,)), (JOINTS["option A shortcut"], (2, 4, 4))]
)
def test_every_constant_fits_its_type(net, shape):
    torch.manual_seed(2)
    packed = calibrated(net, torch.randn(100, *shape), [4.0, 1.0, 8.0, 2.0], 8)
    reduced = reduced_program(packed.model)
    for block in translate(reduced.program, reduced.graph).blocks:
        for kind in ("weight", "scale", "bias"):
            if kind in block.precision:
                stored = block.attributes[f"{kind}_data"]
                np.testing.assert_array_equal(assigned(stored, block.precision[kind]), stored)
