"""Each operator of the C target against the referee: portable, AVX2 and AVX-512 kernels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c_networks import assert_equal_to_referee
from small_networks import C, Net, random_packed
from torch import nn

from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedLayer, code_range
from quant_ops.runtime_mode import largest_pairs
from quant_ops.stored import StoredScale
from search.exporters.c.weights import pack_rows

pytestmark = pytest.mark.compiled

NETS: dict[str, tuple[Net, tuple[int, ...]]] = {
    "strided convolution": (Net(lambda m, x: m.c(x), c=C(3, 5, 3, stride=2, padding=1)), (3, 9, 7)),
    "dilated": (Net(lambda m, x: m.c(x), c=C(4, 6, 3, padding=2, dilation=2)), (4, 9, 7)),
    "groups, depthwise": (
        Net(lambda m, x: m.d(m.c(x)), c=C(4, 6, 3, groups=2), d=C(6, 6, 3, groups=6, padding=1)),
        (4, 9, 7),
    ),
    "transposed": (
        Net(
            lambda m, x: m.d(m.c(x)),
            c=C(4, 6, 3),
            d=nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        ),
        (4, 6, 5),
    ),
    "transposed, groups": (
        Net(
            lambda m, x: m.d(m.c(x)),
            c=C(4, 6, 3),
            d=nn.ConvTranspose2d(6, 4, 3, stride=3, padding=0, groups=2, dilation=2),
        ),
        (4, 6, 5),
    ),
    "one spatial axis": (
        Net(
            lambda m, x: m.f2(F.relu(m.c(x)).flatten(1)), c=nn.Conv1d(3, 5, 3), f2=nn.Linear(30, 4)
        ),
        (3, 8),
    ),
    "three spatial axes": (
        Net(lambda m, x: m.c(x), c=nn.Conv3d(2, 5, 3, padding=1, stride=(1, 2, 1))),
        (2, 4, 5, 6),
    ),
    "mlp": (Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(20, 30), b=nn.Linear(30, 4)), (20,)),
    "rows of features": (
        Net(lambda m, x: m.b(F.relu(m.a(x))).mean(1), a=nn.Linear(20, 30), b=nn.Linear(30, 4)),
        (6, 20),
    ),
    "sum of two scales": (
        Net(
            lambda m, x: m.c(m.a(x) + 0.5 * m.b(x)),
            a=C(3, 8, 3, padding=1),
            b=C(3, 8, 1),
            c=C(8, 4, 1),
        ),
        (3, 6, 6),
    ),
    "option A shortcut": (
        Net(
            lambda m, x: F.relu(m.b(m.a(x)) + F.pad(m.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))),
            a=C(3, 8, 3, padding=1),
            b=C(8, 16, 3, stride=2, padding=1),
        ),
        (3, 8, 8),
    ),
    "concatenation": (
        Net(
            lambda m, x: m.c(torch.cat([m.a(x), F.relu(m.b(x)), x], 1)),
            a=C(3, 8, 3, padding=1),
            b=C(3, 5, 1),
            c=C(16, 4, 1),
        ),
        (3, 6, 6),
    ),
    "maximum": (
        Net(
            lambda m, x: m.c(F.max_pool2d(F.relu(m.a(x)), 3, 2, 1)),
            a=C(3, 8, 3, padding=1),
            c=C(8, 4, 1),
        ),
        (3, 9, 8),
    ),
    "maximum, ceil": (
        Net(
            lambda m, x: m.c(F.max_pool2d(m.a(x), 2, 2, 0, ceil_mode=True)),
            a=C(3, 8, 3, padding=1),
            c=C(8, 4, 1),
        ),
        (3, 9, 7),
    ),
    "maximum, dilated": (
        Net(
            lambda m, x: m.c(F.max_pool2d(m.a(x), 2, 1, 1, dilation=2)),
            a=C(3, 8, 3, padding=1),
            c=C(8, 4, 1),
        ),
        (3, 9, 7),
    ),
    "average, uneven counts": (
        Net(
            lambda m, x: m.c(
                F.avg_pool2d(F.relu(m.a(x)), 3, 2, 1, ceil_mode=True, count_include_pad=False)
            ),
            a=C(3, 8, 3, padding=1),
            c=C(8, 4, 1),
        ),
        (3, 9, 8),
    ),
    "adaptive average": (
        Net(
            lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.a(x)), (3, 2)).flatten(1)),
            a=C(3, 8, 3, padding=1),
            c=nn.Linear(48, 4),
        ),
        (3, 7, 8),
    ),
    "adaptive maximum": (
        Net(
            lambda m, x: m.c(F.adaptive_max_pool2d(m.a(x), (3, 2)).flatten(1)),
            a=C(3, 8, 3, padding=1),
            c=nn.Linear(48, 4),
        ),
        (3, 7, 8),
    ),
    "largest and smallest": (
        Net(
            lambda m, x: m.c(m.a(x).amax((2, 3))) + m.c(m.a(x).amin((2, 3))),
            a=C(3, 8, 3, padding=1),
            c=nn.Linear(8, 4),
        ),
        (3, 7, 8),
    ),
    "channel shuffle": (
        Net(
            lambda m, x: m.c(F.channel_shuffle(m.a(x), 2)),
            a=C(3, 8, 3, padding=1, groups=1),
            c=C(8, 4, 1),
        ),
        (3, 7, 8),
    ),
    "pixel shuffle": (
        Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=C(3, 8, 3, padding=1), c=C(2, 4, 1)),
        (3, 7, 8),
    ),
    "nearest upsampling": (
        Net(
            lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2, mode="nearest")),
            a=C(3, 8, 3, padding=1),
            c=C(8, 4, 1),
        ),
        (3, 7, 8),
    ),
    "chunks": (
        Net(
            lambda m, x: (lambda a, b: m.c(a) + m.d(b))(*m.a(x).chunk(2, 1)),
            a=C(3, 8, 3, padding=1),
            c=C(4, 4, 1),
            d=C(4, 4, 1),
        ),
        (3, 7, 8),
    ),
    "product of two": (
        Net(
            lambda m, x: (lambda y: m.d(y * m.c(y.mean((2, 3), keepdim=True)).clamp(0, 1)))(
                F.relu(m.a(x))
            ),
            a=C(3, 8, 3, padding=1),
            c=C(8, 8, 1),
            d=C(8, 4, 1),
        ),
        (3, 7, 8),
    ),
    "norm before": (
        Net(lambda m, x: m.d(F.relu(m.b(x)) + x), b=nn.BatchNorm2d(4), d=C(4, 4, 1)),
        (4, 7, 8),
    ),
    "relu6": (
        Net(
            lambda m, x: m.d(F.relu6(m.c(F.relu6(m.a(x))))),
            a=C(3, 8, 3, bias=False),
            c=C(8, 8, 3, groups=8),
            d=C(8, 4, 1),
        ),
        (3, 7, 8),
    ),
    "two outputs": (
        Net(lambda m, x: (m.a(x), m.b(x.flatten(1))), a=C(3, 4, 3), b=nn.Linear(48, 3)),
        (3, 4, 4),
    ),
    "permuted": (
        Net(lambda m, x: m.a(x.permute(0, 2, 3, 1)).flatten(1), a=nn.Linear(3, 4)),
        (3, 4, 5),
    ),
    "flatten": (
        Net(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=C(3, 6, 3), b=nn.Linear(6 * 9, 5)),
        (3, 5, 5),
    ),
}
ACTIVATIONS = {"8 bits": (8,), "2 to 16 bits": (2, 4, 8, 12, 16)}


@pytest.mark.parametrize("bits", ACTIVATIONS)
def test_every_operator_gives_the_integers_of_the_referee(bits: str, tmp_path: Path) -> None:
    cases = []
    for seed, (net, shape) in enumerate(NETS.values()):
        torch.manual_seed(seed)
        x = torch.randn(5, *shape)
        cases.append((random_packed(net, (x,), seed, activation_bits=ACTIVATIONS[bits]), (x,)))
    levels = 3 if bits == "8 bits" else 1  # other widths have no kernels of their own
    assert_equal_to_referee(cases, tmp_path, levels=levels)


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
def test_sums_of_extreme_codes_do_not_overflow(bits: int, tmp_path: Path) -> None:
    """All weights of a row at one end, alternating ends, all activations at the largest code."""
    nets = [
        (Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(70, 100), b=nn.Linear(100, 9)), (70,)),
        (Net(lambda m, x: m.b(F.relu(m.a(x))), a=C(5, 20, 3, padding=1), b=C(20, 9, 3)), (5, 6, 6)),
    ]
    cases = []
    for net, shape in nets:
        x = torch.randn(2, *shape).sign() * 100
        x[0] = x[0].abs()
        packed = random_packed(net, (x,), seed=bits, widths=(bits,), schemes=("mid_tread",))
        low, high = code_range(float(bits), "mid_tread")
        layers = {}
        for name, quantized in packed.model.layers.items():
            codes = np.full_like(quantized.codes, low)
            codes[1::3] = high
            codes[2::3, ::2] = high
            layers[name] = replace(quantized, codes=codes)
        cases.append((PackedModel.from_model(replace(packed.model, layers=layers)), (x,)))
    assert_equal_to_referee(cases, tmp_path)


@pytest.mark.parametrize(
    ("weights", "depth"),
    [
        ([[64, 64, 0]], 1),
        ([[64, 65, 0]], 0),
        ([[-8, -8, 7], [7, 7, 0]], 8),
        ([[-100, 100, 1]], 1),
        ([[0, 0, 0]], 128),
    ],
)
def test_depth_is_what_16_bits_hold(weights: list[list[int]], depth: int) -> None:
    codes = np.array(weights, np.int16)
    scale = StoredScale(np.float32(1), np.full((len(codes), 1), 255, np.uint8))
    layer = QuantizedLayer((8.0,) * len(codes), codes, {8.0: scale}, frozenset(), None, None)
    assert pack_rows(codes, layer).depth == depth
    assert max(depth, 1) * 255 * largest_pairs(codes).max() <= 2**15 - 1 or depth == 0
