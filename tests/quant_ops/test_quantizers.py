"""Against an exact rational reference, torch and onnxruntime, and by their invariances."""

import math
from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant_ops.bit_widths import LEVELS
from quant_ops.quantized import code_range
from quant_ops.quantizers import (
    dequantize,
    effective_scheme,
    fake_quantize,
    grouped,
    levels_of,
    quantize,
    squared_errors,
)

SYMMETRIC = [(b, s) for b in LEVELS if b for s in ("mid_tread", "mid_rise")]
AFFINE = [(b, "affine") for b in LEVELS if b >= 2]


def exact_code(value, scale, bit_width, scheme, zero_point=0):
    """The code of the nearest level by exhaustive search in rational arithmetic."""
    scheme = effective_scheme(bit_width, scheme)
    low, high = code_range(bit_width, scheme)
    offset = Fraction(1, 2) if scheme == "mid_rise" else Fraction(-zero_point)
    target = Fraction(value) / Fraction(scale)

    def badness(code):
        level = code + offset
        ties = -abs(level) if scheme == "mid_rise" else (code - zero_point) % 2
        negative = level < 0 if value >= 0 else level > 0
        return abs(target - level), ties, negative

    return min(range(low, high + 1), key=badness)


def values_around_every_tie(bit_width, scale):
    """Multiples of a quarter step and their neighbours in float32, beyond both ends."""
    ends = LEVELS[bit_width] + 2
    quarters = np.arange(-4 * ends, 4 * ends + 1, dtype=np.float32) / np.float32(4)
    centers = quarters * np.float32(scale)
    around = [centers, np.nextafter(centers, np.inf), np.nextafter(centers, -np.inf)]
    return torch.from_numpy(np.unique(np.concatenate(around).astype(np.float32)))


@pytest.mark.parametrize(("bit_width", "scheme"), [p for p in SYMMETRIC + AFFINE if p[0] <= 5])
@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-20 * 1.3])
def test_codes_equal_exhaustive_search_in_fractions(bit_width, scheme, scale):
    scale = float(np.float32(scale))
    values = values_around_every_tie(bit_width, scale)
    zero_point = LEVELS[bit_width] // 3 if scheme == "affine" else 0
    zero = torch.tensor([zero_point]) if scheme == "affine" else None
    codes = quantize(values, torch.tensor(scale), bit_width, scheme, zero)
    expected = [exact_code(v, scale, bit_width, scheme, zero_point) for v in values.tolist()]
    assert codes.tolist() == expected


@pytest.mark.parametrize(("bit_width", "scheme"), SYMMETRIC)
def test_dequantized_values_are_the_level_rounded_once(bit_width, scheme):
    scheme = effective_scheme(bit_width, scheme)
    low, high = code_range(bit_width, scheme)
    scale = np.float32(0.037)
    codes = torch.arange(low, high + 1, dtype=torch.int16)
    values = dequantize(codes, torch.tensor(scale), bit_width, scheme)
    offset = Fraction(1, 2) if scheme == "mid_rise" else 0
    exact = [
        float(np.float32(float((c + offset) * Fraction(float(scale))))) for c in codes.tolist()
    ]
    assert values.tolist() == exact


floats = st.floats(-8, 8, width=32, allow_subnormal=False)


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from(SYMMETRIC), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_code(values, kind, exponent):
    values, k = torch.tensor(values), 2.0**exponent
    scale = torch.tensor(0.3)
    assert torch.equal(quantize(values, scale, *kind), quantize(k * values, k * scale, *kind))
    assert torch.equal(
        k * fake_quantize(values, scale, *kind), fake_quantize(k * values, k * scale, *kind)
    )


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from(SYMMETRIC))
def test_fake_quantize_is_idempotent(values, kind):
    once = fake_quantize(torch.tensor(values), torch.tensor(0.3), *kind)
    assert torch.equal(fake_quantize(once, torch.tensor(0.3), *kind), once)


@given(st.lists(floats.filter(bool), min_size=1, max_size=20), st.sampled_from(sorted(LEVELS)[1:]))
def test_mid_rise_is_odd(values, bit_width):
    if bit_width == 1.6:
        return
    values, scale = torch.tensor(values), torch.tensor(0.25)
    plus, minus = (fake_quantize(v, scale, bit_width, "mid_rise") for v in (values, -values))
    assert torch.equal(plus, -minus)


@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["mid_tread", "affine"])
def test_torch_agrees(bit_width, scheme):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 500, generator=generator)
    scale = 2.0 ** -torch.arange(1.0, 7.0)[:, None]
    zero = torch.arange(6)[:, None] % LEVELS[bit_width] if scheme == "affine" else None
    low, high = code_range(bit_width, scheme)
    theirs = torch.fake_quantize_per_channel_affine(
        values,
        scale[:, 0],
        torch.zeros(6, dtype=torch.int32) if zero is None else zero[:, 0].int(),
        0,
        low,
        high,
    )
    assert torch.equal(fake_quantize(values, scale, bit_width, scheme, zero), theirs)


@pytest.mark.parametrize("scheme", ["mid_tread", "affine"])
def test_onnxruntime_agrees(scheme):
    from onnx import TensorProto, helper

    values = np.random.default_rng(0).normal(size=(5, 400)).astype(np.float32)
    scale = np.array([0.01, 0.02, 0.013, 0.5, 0.031], np.float32)
    dtype = np.int8 if scheme == "mid_tread" else np.uint8
    zero = np.zeros(5, dtype) if scheme == "mid_tread" else np.array([0, 7, 128, 255, 100], dtype)
    code_type = TensorProto.INT8 if scheme == "mid_tread" else TensorProto.UINT8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 400]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [5]),
            helper.make_tensor_value_info("z", code_type, [5]),
        ],
        [
            helper.make_tensor_value_info("q", code_type, [5, 400]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 400]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    q, y = session.run(None, {"x": values, "s": scale, "z": zero})
    zero_point = torch.from_numpy(zero.astype(np.int64))[:, None] if scheme == "affine" else None
    wide = torch.from_numpy(scale)[:, None]
    codes = quantize(torch.from_numpy(values), wide, 8, scheme, zero_point)
    ratio = values.astype(np.float64) / scale[:, None]
    far_from_ties = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-4
    assert np.array_equal(codes.numpy()[far_from_ties], q[far_from_ties])
    ours = dequantize(codes, wide, 8, scheme, zero_point).numpy()
    assert np.array_equal(ours[far_from_ties], y[far_from_ties])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(torch.tensor([1.0, bad]), torch.tensor(1.0), 4, "mid_tread")


def test_groups_have_one_row_each():
    weights = torch.arange(24.0).reshape(2, 12)
    assert grouped(weights, 4).tolist()[3] == [12, 13, 14, 15]
    assert grouped(weights, None) is weights
    with pytest.raises(ValueError, match="does not divide"):
        grouped(weights, 5)


@pytest.mark.parametrize(("bit_width", "scheme"), SYMMETRIC + AFFINE)
def test_squared_errors_are_those_of_fake_quantize(bit_width, scheme):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 30, generator=generator)
    importance = torch.rand(7, 30, generator=generator)
    scales = torch.rand(3, 7, generator=generator) + 0.05
    zero = torch.full((7, 1), LEVELS[bit_width] // 2) if scheme == "affine" else None
    levels = levels_of(bit_width, scheme, zero)
    errors = squared_errors(rows, scales, levels, importance)
    for candidate, scale in enumerate(scales):
        quantized = fake_quantize(rows, scale[:, None], bit_width, scheme, zero)
        expected = ((quantized - rows).double().square() * importance).sum(dim=1)
        torch.testing.assert_close(errors[candidate], expected, rtol=1e-4, atol=1e-9)
