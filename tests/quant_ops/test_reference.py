"""Single operators of the integer program against an oracle in float64, exact by powers of two."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_oracle import (
    AVERAGES,
    CONVOLUTIONS,
    FUNCTIONS,
    Through,
    assert_both_engines_agree,
    check,
    images,
    random_model,
)
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.edges import activation_edges
from quant_ops.integer_weights import accumulator_bits, accumulator_bound
from quant_ops.lowering import lower
from quant_ops.program import Convolution, MatMul
from quant_ops.reference import run
from quant_ops.requantize import Codes
from search.capture import trace


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_equals_the_oracle_with_mixed_widths_and_zero_points(case: str) -> None:
    module, shape = CONVOLUTIONS[case]
    check(module, images(*shape), seeds=3, widths=BIT_WIDTHS)


@pytest.mark.parametrize("case", FUNCTIONS)
def test_an_operator_equals_the_oracle(case: str) -> None:
    check(Through(FUNCTIONS[case]), images(2, 3, 6, 6), seeds=3, activation_bits=(4, 8))


@pytest.mark.parametrize("case", AVERAGES)
def test_an_average_is_the_exact_sum_divided_and_rounded_once(case: str) -> None:
    def average(x: Tensor) -> Tensor:
        return AVERAGES[case](x) + 0.0

    module = Through(average)
    x = images(3, 3, 7, 6)
    traced = trace(module, (x,))
    model = random_model(traced, (x,), np.random.default_rng(0))
    program = lower(model)
    result = assert_both_engines_agree(program, (x,))
    conv, mean = (e for e in activation_edges(traced.graph) if e.kind == "inner")
    a, b = model.activations[conv.name], model.activations[mean.name]
    real = torch.from_numpy(result.codes[conv.name] - a.zero_point).double() * a.scale
    wanted = AVERAGES[case](real).numpy() / b.scale
    low, high = b.code_range
    rounded = np.clip(np.floor(wanted + 0.5) + b.zero_point, low, high)
    tie = np.abs(wanted - np.floor(wanted) - 0.5) < 1e-6  # 1 / count has no exact multiplier
    np.testing.assert_array_equal(result.codes[mean.name][~tie], rounded[~tie])
    assert np.abs(result.codes[mean.name] - rounded).max() <= 1


def test_embedding_codes_are_looked_up_and_rescaled_by_row() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(F.relu(self.table(tokens)))

    tokens = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    check(Tokens(), tokens, widths=BIT_WIDTHS)


def test_a_channel_affine_map_has_signed_multipliers_per_channel() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3, eps=0.0)
            self.conv = nn.Conv2d(3, 2, 1)
            with torch.no_grad():
                self.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
                self.norm.bias.copy_(torch.tensor([0.25, 0.0, -1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.norm(x)))

    check(PreActivation(), images(2, 3, 4, 4))


def test_ties_of_the_top_class_go_to_the_lowest_index() -> None:
    x = images(4, 3)
    traced = trace(nn.Linear(3, 5), (x,))
    model = random_model(traced, (x,), np.random.default_rng(0), widths=(4,))
    layer = next(iter(model.layers.values()))
    layer.codes[:] = layer.codes[:1]
    for scale in layer.scales.values():
        scale.ratio[:] = scale.ratio[:1]
    assert layer.bias is not None
    layer.bias.codes[:] = layer.bias.codes[:1]
    if layer.zero_points is not None:
        layer.zero_points[:] = layer.zero_points[:1]
    integers = run(lower(model), [x.numpy()]).integers[0]
    assert integers is not None
    assert integers.dtype == np.int32
    assert (integers.argmax(1) == 0).all()


def test_the_accumulator_is_64_bits_wide_exactly_where_32_could_overflow() -> None:
    assert accumulator_bits(2**31 - 1) == 32
    assert accumulator_bits(2**31) == 64
    source = Codes(1.0, 3, 0, 255)  # reaches from -3 to 252
    weights = np.array([[100, -100, 50]], np.int16)
    assert accumulator_bound(weights, source) == 150 * 252 + 100 * 3
    assert accumulator_bound(-weights, source) == 150 * 252 + 100 * 3
    worst = np.full((1, 33026), 255, np.int16)
    assert accumulator_bits(accumulator_bound(worst, Codes(1.0, 0, 0, 255))) == 64
    assert accumulator_bits(accumulator_bound(worst[:, :33025], Codes(1.0, 0, 0, 255))) == 32


def test_a_sum_beyond_float32_is_exact_in_both_engines() -> None:
    x = images(2, 3000)
    program = check(nn.Linear(3000, 2), x, widths=(8,), schemes=("mid_rise",))
    step = program.steps[-1]
    assert isinstance(step, MatMul)
    assert step.bound > 2**24
    assert step.accumulator_bits == 32


def test_a_convolution_equals_loops_over_python_integers() -> None:
    """Any scales; every product, sum, shift and clamp by hand."""
    module = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = images(1, 2, 3, 4)
    traced = trace(module, (x,))
    model = random_model(traced, (x,), np.random.default_rng(3), exact=False, widths=BIT_WIDTHS)
    program = lower(model)
    codes = run(program, [x.numpy()], tuple(program.edges)).codes
    step = program.steps[1]
    assert isinstance(step, Convolution)
    source, target = (codes[e.name] for e in activation_edges(traced.graph)[:2])
    r = step.rescale
    _, n_out, height, width = target.shape
    for o in range(n_out):
        for i in range(height):
            for j in range(width):
                total = 0
                for c in range(2):
                    for di in range(2):
                        for dj in range(2):
                            y, z = 2 * i + di - 1, 2 * j + dj - 1
                            if 0 <= y < 3 and 0 <= z < 4:
                                code = int(source[0, c, y, z]) - step.zero_points[0]
                                total += code * int(step.weights[o, c, di, dj])
                m, b, n = (int(a.flat[o]) for a in (r.multipliers[0], r.offset, r.shift))
                assert target[0, o, i, j] == min(
                    max(((total * m + b) >> n) + r.zero_point, r.low), r.high
                )
