"""An oracle in float64 for integer programs, random models, and operators to try it on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.graph import Layer
from quant_ops.lowering import lower
from quant_ops.program import IntegerProgram
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel, code_range
from quant_ops.reference import run, run_torch
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
