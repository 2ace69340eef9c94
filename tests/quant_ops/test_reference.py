"""The integer program against an oracle in float64, where powers of two make it exact."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Layer
from quant_ops.integer_weights import accumulator_bits, accumulator_bound
from quant_ops.lowering import lower
from quant_ops.program import Convolution, IntegerProgram, MatMul
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel, code_range
from quant_ops.reference import fake_quant_transforms, run, run_torch
from quant_ops.requantize import Codes
from quant_ops.stored import StoredBias, StoredScale
from search.capture import Traced, trace

Rng = np.random.Generator


def random_layer(
    layer: Layer, widths: Sequence[float], rng: Rng, *, exact: bool, scheme: str
) -> QuantizedLayer:
    """Random codes. exact: every scale is a power of two."""
    n = layer.weights_per_channel
    codes = np.zeros((layer.out_channels, n), np.int16)
    affine = scheme == "affine"
    zero_points = rng.integers(0, 2, (layer.out_channels, 1)).astype(np.int16) if affine else None
    mid_rise = set()
    scales = {}
    for width in sorted(set(widths) - {0}):
        rows = np.asarray(widths) == width
        own = scheme
        if scheme == "mid_rise" or (width == 1 and not affine):
            own = "mid_rise"
            mid_rise.add(width)
        low, high = code_range(width, own)
        codes[rows] = rng.integers(low, high + 1, (int(rows.sum()), n))
        ratio = rng.integers(0, 4 * 16, (int(rows.sum()), 1))
        if exact:
            ratio = ratio // 16 * 16 + 15  # mantissa 16 of 32
        base = 2.0 ** -int(rng.integers(2, 5)) * (1.0 if exact else rng.uniform(1, 2))
        scales[width] = StoredScale(np.float32(base / max(high, 1)), ratio.astype(np.uint8))
        if exact:
            scales[width] = StoredScale(np.float32(2.0**-8), ratio.astype(np.uint8))
    bias = StoredBias(
        np.float32(2.0**-12 if exact else 0.0002),
        rng.integers(-3000, 3000, layer.out_channels).astype(np.int16),
    )
    return QuantizedLayer(
        tuple(widths),
        codes,
        scales,
        frozenset(mid_rise),
        zero_points,
        None if layer.kind == "embedding" else bias,
    )


def random_model(
    traced: Traced,
    inputs: Sequence[Tensor],
    rng: Rng,
    *,
    exact: bool = True,
    activation_bits: Sequence[int] = (8,),
    widths: Sequence[float] = (4,),
    schemes: Sequence[str] = ("mid_tread", "mid_rise", "affine"),
) -> QuantizedModel:
    """Random codes for every layer; ranges of edges from the values that arise."""
    graph = traced.graph
    layers = {
        layer.name: random_layer(
            layer,
            [float(w) for w in rng.choice(widths, layer.out_channels)],
            rng,
            exact=exact,
            scheme=str(rng.choice(schemes)),
        )
        for layer in graph.searchable_layers
    }
    bits = {
        e.name: int(rng.choice(activation_bits))
        for e in activation_edges(graph)
        if e.kind != "output"
    }
    candidate = Candidate.of(
        {name: LayerQuant(quantized.bit_widths) for name, quantized in layers.items()}, bits
    )
    weights = {layer.weight for layer in graph.searchable_layers}
    biases = {layer.bias for layer in graph.searchable_layers}
    floats = {n: p for n, p in traced.params.items() if n not in weights | biases}
    activations: dict[str, ActivationQuant] = {}
    model = QuantizedModel(graph, candidate, layers, activations, floats)

    def calibrate(name: str) -> Callable[[Tensor], Tensor]:
        def quantize(x: Tensor) -> Tensor:
            top = max(float(x.abs().max()), 1e-3)
            signed = bool(rng.integers(2)) or bool(x.min() < 0)
            scale = top / ActivationQuant(bits[name], signed, 1.0).code_range[1]
            scale = 2.0 ** np.ceil(np.log2(scale)) if exact else float(np.float32(scale))
            zero_point = int(rng.integers(-1, 2)) if signed else int(rng.integers(0, 3))
            activations[name] = ActivationQuant(bits[name], signed, scale, zero_point)
            return floored(activations[name], x)

        return quantize

    transforms = {e.node: calibrate(e.name) for e in activation_edges(graph) if e.name in bits}
    in_float64(model, inputs, transforms)
    return model


def floored(quant: ActivationQuant, x: Tensor) -> Tensor:
    """floor(x / scale + 1/2), as integer steps round."""
    low, high = (end - quant.zero_point for end in quant.code_range)
    return torch.floor(x / quant.scale + 0.5).clamp(low, high) * quant.scale


def half_even(quant: ActivationQuant, x: Tensor) -> Tensor:
    low, high = (end - quant.zero_point for end in quant.code_range)
    return torch.round(x / quant.scale).clamp(low, high) * quant.scale


def in_float64(
    model: QuantizedModel, inputs: Sequence[Tensor], transforms: Any, keep: Sequence[int] = ()
) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
    params = {n: p.double() if p.is_floating_point() else p for n, p in model.params().items()}
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return Executor(model.graph).run(params, wide, transforms=transforms, keep=keep)


def assert_both_engines_agree(program: IntegerProgram, inputs: Sequence[Tensor]) -> Any:
    arrays = [x.numpy() for x in inputs]
    edges = tuple(program.edges)
    slow, fast = run(program, arrays, edges), run_torch(program, arrays, edges)
    for name in edges:
        np.testing.assert_array_equal(slow.codes[name], fast.codes[name], err_msg=name)
    for a, b in zip(slow.values, fast.values, strict=True):
        np.testing.assert_array_equal(a, b)
    return slow


def assert_equals_oracle(model: QuantizedModel, inputs: Sequence[Tensor]) -> IntegerProgram:
    """Code for code, with scales that are powers of two; then every output."""
    program = lower(model)
    assert program.float_islands == ()
    result = assert_both_engines_agree(program, inputs)
    edges = {e.name: e for e in activation_edges(model.graph)}
    transforms = {
        edges[name].node: partial(half_even if edges[name].kind == "input" else floored, quant)
        for name, quant in model.activations.items()
    }
    outputs, kept = in_float64(model, inputs, transforms, list(transforms))
    for name, quant in model.activations.items():
        expected = kept[edges[name].node] / quant.scale + quant.zero_point
        np.testing.assert_array_equal(result.codes[name], expected.numpy(), err_msg=name)
    for number, value, expected in zip(program.outputs, result.values, outputs, strict=True):
        codes = program.codes[number]
        assert codes is not None
        rounded = torch.floor(expected / codes.scale + 0.5) * codes.scale
        np.testing.assert_array_equal(value, rounded.numpy())
    return program


def check(module: nn.Module, *inputs: Tensor, seeds: int = 1, **options: Any) -> IntegerProgram:
    """Trace once, compare with the oracle for several random models."""
    traced = trace(module, inputs)
    for seed in range(seeds):
        model = random_model(traced, inputs, np.random.default_rng(seed), **options)
        program = assert_equals_oracle(model, inputs)
    return program


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Through(nn.Module):
    """A convolution, then any function of its value."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    "strided and padded": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), (2, 3, 7, 8)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=2), (2, 3, 7, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "same, asymmetric": (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 7, 8)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 8)),
    "one-dimensional": (nn.Conv1d(3, 4, 5, stride=2, padding=3), (2, 3, 17)),
    "three-dimensional": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 4, 5)),
    "transposed, grouped, cropped": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=2, output_padding=1, groups=2),
        (2, 4, 4, 5),
    ),
    "transposed, dilated": (nn.ConvTranspose2d(3, 2, 2, dilation=2, padding=3), (2, 3, 8, 8)),
    "transposed, one-dimensional": (nn.ConvTranspose1d(3, 2, 4, stride=3), (2, 3, 6)),
    "linear on four axes": (nn.Linear(5, 4), (2, 3, 2, 5)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_equals_the_oracle_with_mixed_widths_and_zero_points(case: str) -> None:
    module, shape = CONVOLUTIONS[case]
    check(module, images(*shape), seeds=3, widths=BIT_WIDTHS)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4),
    "clamp": lambda x: x.clamp(max=0.25).flatten(1),
    "a relu read with its source": lambda x: torch.cat([F.relu(x), x], 1),
    "a relu6 read with its source": lambda x: torch.cat([F.relu6(x), x], 1),
    "add": lambda x: F.relu(x + x.flip(2)),
    "sub with a factor": lambda x: torch.sub(x, x.flip(3), alpha=0.5) + 0.25,
    "scaling": lambda x: (2 - x * 4) / 2,
    "negation": lambda x: -x,
    "product": lambda x: F.relu(x * x.transpose(2, 3)),
    "squeeze and excite": lambda x: x * F.relu6(x.mean((2, 3), keepdim=True)),
    "cat": lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x), -x], 1).relu(),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1, 2, 2)) * 2,
    "option A": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + 0.5,
    "max pool": lambda x: F.max_pool2d(x, 3, stride=2, padding=1) * 2,
    "max pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "maximum over an axis": lambda x: x.max(2).values + x.amax(3),
    "split": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1).reshape(x.shape[0], -1),
    "nearest upsampling": lambda x: F.interpolate(x, scale_factor=2.0) + 1,
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2).permute(0, 2, 3, 1),
    "sum over space": lambda x: x.sum((2, 3)),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_an_operator_equals_the_oracle(case: str) -> None:
    check(Through(FUNCTIONS[case]), images(2, 3, 6, 6), seeds=3, activation_bits=(4, 8))


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "uneven windows": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "mean": lambda x: x.mean(3),
    "pool that counts padding": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "pool without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "pool past the end": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "pool past the end, padding not counted": lambda x: F.avg_pool2d(
        x, (2, 3), (3, 2), (1, 0), True, False
    ),
    "pool with its own divisor": lambda x: F.avg_pool2d(x, 3, divisor_override=5),
}


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


class Residual(nn.Module):
    """Small ResNet: option-A shortcut, average, linear."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.c = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + x)
        half = self.width // 2
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        x = F.relu(self.c(F.relu(self.b(x))) + shortcut)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_residual_network_equals_the_oracle_code_for_code() -> None:
    check(Residual(), images(2, 3, 8, 8), seeds=4, widths=BIT_WIDTHS, activation_bits=(4, 8))


@pytest.mark.parametrize("widths", [(8,), (4,), (2, 3), (1.6,)])
def test_fake_quantization_differs_from_the_integers_in_few_codes_and_by_one(
    widths: tuple[float, ...],
) -> None:
    """Each edge from equal inputs: a difference is not followed into the layers after it."""
    x = images(16, 3, 16, 16)
    traced = trace(Residual(8), (x[:2],))
    model = random_model(traced, (x,), np.random.default_rng(1), exact=False, widths=widths)
    program = lower(model)
    codes = run_torch(program, [x.numpy()], tuple(program.edges)).codes
    off: list[NDArray[np.float64]] = []

    def compare(name: str, transform: Transform) -> Transform:
        quant = model.activations[name]
        integers = torch.from_numpy(codes[name] - quant.zero_point)

        def quantized(value: Tensor) -> Tensor:
            off.append((transform(value) / quant.scale - integers).round().abs().numpy().ravel())
            return integers * torch.tensor(quant.scale)

        return quantized

    faked = fake_quant_transforms(model)
    transforms = {number: compare(name, faked[number]) for name, number in program.edges.items()}
    Executor(model.graph).run(model.params(), [x], transforms=transforms)
    differences = np.concatenate(off)
    assert len(off) == len(model.activations)
    assert differences.max() <= 1
    assert differences.mean() <= 1e-3


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


def islands(program: IntegerProgram) -> list[str]:
    return [island.op for island in program.float_islands]


def test_without_activation_quantizers_the_program_equals_the_executor() -> None:
    x = images(2, 3, 8, 8)
    traced = trace(Residual(), (x,))
    full = random_model(traced, (x,), np.random.default_rng(0), exact=False)
    model = QuantizedModel(full.graph, full.candidate, full.layers, {}, full.float_params)
    program = lower(model)
    assert len(islands(program)) > 5
    expected = Executor(model.graph)(model.params(), [x])[0].numpy()
    np.testing.assert_array_equal(run(program, [x.numpy()]).values[0], expected)


class WithIslands(nn.Module):
    """Softmax, layer norm and a linear layer that stays float, between integer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.norm(self.first(x)))
        attention = torch.softmax(x @ x.transpose(1, 2), -1)
        return self.head(self.second(attention @ x)), attention


def test_operators_without_integer_form_are_float_islands_between_integer_steps() -> None:
    x = images(2, 5, 6)
    traced = trace(WithIslands(), (x,))
    model = random_model(traced, (x,), np.random.default_rng(0), exact=False)
    program = lower(model)
    names = [op.split(".")[0].removeprefix("_") for op in islands(program)]
    assert "gelu" in names
    assert "softmax" in names
    assert "linear" not in names
    assert_both_engines_agree(program, (x,))
    del model.layers["second"]  # type: ignore[attr-defined]
    for name in ("second.weight", "second.bias"):
        model.float_params[name] = traced.params[name]  # type: ignore[index]
    program = lower(model)
    assert [i.reason for i in program.float_islands if "linear" in i.op] == [
        "its weights stay float"
    ]
    assert_both_engines_agree(program, (x,))


def test_several_scales_per_channel_make_a_float_island() -> None:
    x = images(2, 8)
    traced = trace(nn.Linear(8, 3), (x,))
    model = random_model(traced, (x,), np.random.default_rng(0), schemes=("mid_tread",))
    name, layer = next(iter(model.layers.items()))
    grouped = {
        w: StoredScale(s.base, np.repeat(s.ratio, 2, axis=1)) for w, s in layer.scales.items()
    }
    model.layers[name] = QuantizedLayer(  # type: ignore[index]
        layer.bit_widths, layer.codes, grouped, layer.mid_rise, None, layer.bias
    )
    (island,) = lower(model).float_islands
    assert island.reason == "its weights have several scales per channel"


class Drawn(nn.Module):
    """A small network drawn at random: branches, strides, groups, pools."""

    def __init__(self, rng: Rng) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.kinds: list[tuple[str, str]] = []
        channels = 2
        for _ in range(int(rng.integers(1, 4))):
            kind = str(rng.choice(["plain", "residual", "cat", "pool", "up"]))
            groups = int(rng.choice([1, channels])) if kind != "up" else 1
            out = channels * int(rng.integers(1, 3)) if kind != "residual" else channels
            kernel = int(rng.integers(1, 4))
            conv: nn.Module
            if kind == "up":
                conv = nn.ConvTranspose2d(channels, out, 2, stride=2, padding=1, output_padding=1)
            elif kind in ("residual", "cat"):
                conv = nn.Conv2d(channels, out, kernel, padding="same", groups=groups)
            else:
                pad, stride = int(rng.integers(0, 3)), int(rng.integers(1, 3))
                conv = nn.Conv2d(channels, out, kernel, stride, pad, groups=groups)
            self.blocks.append(conv)
            self.kinds.append((kind, str(rng.choice(["relu", "relu6", "none"]))))
            channels = out + channels if kind == "cat" else out
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv, (kind, after) in zip(self.blocks, self.kinds, strict=True):
            y = conv(x)
            if kind == "residual":
                y = y + x
            y = F.relu(y) if after == "relu" else F.relu6(y) if after == "relu6" else y
            if kind == "cat":
                y = torch.cat([y, x], 1)
            x = F.max_pool2d(y, 2, padding=1) if kind == "pool" else y
        return self.head(x.amax((2, 3)))


def takes(network: nn.Module, x: torch.Tensor) -> bool:
    """Whether no kernel is larger than what the strides before it have left."""
    try:
        network(x)
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), exact=st.booleans())
def test_random_networks_equal_the_oracle_in_both_engines(seed: int, exact: bool) -> None:
    rng = np.random.default_rng(seed)
    x = images(2, 2, 6, 6, seed=seed % 1000)
    network = Drawn(rng).eval()
    assume(takes(network, x))
    traced = trace(network, (x,))
    options = {"exact": exact, "widths": BIT_WIDTHS, "activation_bits": (4, 8)}
    model = random_model(traced, (x,), rng, **options)
    if exact:
        assert_equals_oracle(model, (x,))
    else:
        assert_both_engines_agree(lower(model), (x,))
