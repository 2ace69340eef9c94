"""ONNX models, executed, equal bit for bit: to the normative reference (arithmetic "exact"), or to
the reference with ONNX Runtime's rounding ("runtime")."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from quant_ops.reduced import reduced_model
from quant_ops.reference import run_torch
from quant_ops.runtime_mode import run_runtime_mode
from search.capture import trace
from search.exporters.onnx_graph.network import with_codes, write_network
from search.exporters.onnx_runtime import onnx_bytes, runner_of
from search.vectors import run_packed

REFERENCE_MODELS = Path(__file__).parents[2] / "quant_ops" / "reference_oracle.py"
_spec = importlib.util.spec_from_file_location("reference_models", REFERENCE_MODELS)
assert _spec is not None
assert _spec.loader is not None
reference_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_models)


def with_batch(x: Tensor, n: int) -> Tensor:
    same = x[:1].expand(n, *x.shape[1:]).contiguous()
    return same + 0.1 * torch.randn(same.shape) if x.is_floating_point() else same


@pytest.fixture(params=["runtime", "exact"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_equal(
    model: QuantizedModel, inputs: tuple[Tensor, ...], arithmetic: str
) -> onnx.ModelProto:
    exact = arithmetic == "exact"
    smaller = reduced_model(model)
    program = lower(smaller)
    assert program.float_islands == ()
    full = run_torch(lower(model), [x.numpy() for x in inputs])
    less = run_torch(program, [x.numpy() for x in inputs])
    for number, a, b in zip(program.outputs, full.values, less.values, strict=True):
        codes = program.codes[number]
        assert codes is not None
        # half-step codes of absent columns may make the output's unit larger in the whole model
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * codes.scale)
    content = onnx_bytes(model, {}, exact=exact)
    run = runner_of(content, Path("model.onnx"))
    reference = run_torch if exact else run_runtime_mode
    for batch in (inputs, tuple(with_batch(x, 3) for x in inputs)):
        wanted = reference(program, [x.numpy() for x in batch]).values
        for mine, expected in zip(run(batch), wanted, strict=True):
            np.testing.assert_array_equal(mine.numpy(), expected)
    if exact:
        assert_every_code_is_equal(smaller, inputs)
    return onnx.load_from_string(content)


def assert_every_code_is_equal(model: QuantizedModel, inputs: tuple[Tensor, ...]) -> None:
    """Of each edge inside the network, to those of the normative reference."""
    program = lower(model)
    written = write_network(model, program, exact=True)
    assert len(written.codes) >= len(model.activations)
    content = with_codes(written).SerializeToString()
    outputs = runner_of(content, Path("model.onnx"))(inputs)
    wanted = run_torch(program, [x.numpy() for x in inputs], list(written.codes)).codes
    for edge, mine in zip(written.codes, outputs[len(program.outputs) :], strict=True):
        codes = program.codes[program.edges[edge]]
        assert codes is not None
        np.testing.assert_array_equal(mine.numpy().astype(np.int32) + codes.low, wanted[edge])


def random_model(
    module: nn.Module, *inputs: Tensor, seed: int = 0, **options: object
) -> QuantizedModel:
    """As it comes out of a packed file: codes of absent columns stand for zero."""
    traced = trace(module, inputs)
    rng = np.random.default_rng(seed)
    return repacked(reference_models.random_model(traced, inputs, rng, exact=False, **options))


def repacked(model: QuantizedModel) -> QuantizedModel:
    quants = {
        name: LayerQuant(layer.bit_widths, "auto" if layer.zero_points is None else "affine")
        for name, layer in model.layers.items()
    }
    candidate = Candidate.of(quants, dict(model.candidate.activations))
    return PackedModel.from_model(replace(model, candidate=candidate)).model


def check(
    arithmetic: str, module: nn.Module, *inputs: Tensor, seeds: int = 1, **options: object
) -> None:
    for seed in range(seeds):
        model = random_model(module, *inputs, seed=seed, **options)
        assert_equal(model, inputs, arithmetic)


images = reference_models.images


@pytest.mark.parametrize("case", reference_models.CONVOLUTIONS)
def test_every_convolution_with_every_width(case: str, arithmetic: str) -> None:
    module, shape = reference_models.CONVOLUTIONS[case]
    check(arithmetic, module, images(*shape), seeds=2, widths=BIT_WIDTHS)


@pytest.mark.parametrize("case", reference_models.FUNCTIONS)
def test_every_operator_with_an_integer_form(case: str, arithmetic: str) -> None:
    function = reference_models.FUNCTIONS[case]
    module = reference_models.Through(function)
    check(arithmetic, module, images(2, 3, 6, 6), seeds=2, activation_bits=(4, 8))


@pytest.mark.parametrize("case", reference_models.AVERAGES)
def test_every_average(case: str, arithmetic: str) -> None:
    def average(x: Tensor) -> Tensor:
        return reference_models.AVERAGES[case](x) + 0.0

    check(arithmetic, reference_models.Through(average), images(3, 3, 7, 6))


class Residual(nn.Module):
    """Option-A shortcut, depthwise and pointwise convolutions, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = F.relu(self.pointwise(F.relu6(self.depthwise(x))) + shortcut)
        y = torch.cat([y, F.max_pool2d(x, 2)], 1)
        return self.head(y.mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransformerBlock(nn.Module):
    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(50, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, size = x.shape
        shape = (batch, length, self.heads, size // self.heads)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, size))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def tokens(n: int = 2) -> Tensor:
    return torch.randint(0, 50, (n, 7), generator=torch.Generator().manual_seed(0))


GRAPHS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "residual": (Residual, lambda: images(2, 3, 8, 8)),
    "perceptron": (Perceptron, lambda: images(2, 20)),
    "transformer block": (TransformerBlock, tokens),
}


def weights_only(
    module: nn.Module, x: Tensor, seed: int = 0, widths: tuple[float, ...] = BIT_WIDTHS,
    schemes: tuple[str, ...] = ("mid_tread", "mid_rise", "affine"),
) -> PackedModel:  # fmt: skip
    """Random codes whose values are near those of a trained layer; activations stay float."""
    model = random_model(module, x, seed=seed, widths=widths, schemes=schemes)
    candidate = Candidate(model.candidate.layers, ())
    return PackedModel.from_model(replace(model, candidate=candidate, activations={}))


@pytest.mark.parametrize("case", ["residual", "perceptron"])
def test_whole_integer_networks(case: str, arithmetic: str) -> None:
    module, inputs = GRAPHS[case]
    check(arithmetic, module(), inputs(), seeds=3, widths=BIT_WIDTHS, activation_bits=(4, 8))


@pytest.mark.parametrize("case", GRAPHS)
def test_weights_alone_give_the_outputs_of_the_packed_model(case: str) -> None:
    module, inputs = GRAPHS[case]
    for seed in range(3):
        packed = weights_only(module(), inputs(), seed)
        run = runner_of(onnx_bytes(packed.model, {}), Path("model.onnx"))
        for batch in (inputs(), inputs()[:1]):
            (mine,), (wanted,) = run([batch]), run_packed(packed, (batch,))
            torch.testing.assert_close(
                mine, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
            )


def test_float_operators_between_integer_layers() -> None:
    model = random_model(TransformerBlock(), tokens(), widths=(8,))
    program = lower(reduced_model(model))
    assert program.float_islands
    run = runner_of(onnx_bytes(model, {}), Path("model.onnx"))
    (mine,) = run([tokens()])
    wanted = run_runtime_mode(program, [tokens().numpy()]).values[0]
    close = np.isclose(mine.numpy(), wanted, atol=0.02 * np.abs(wanted).max())
    assert close.mean() > 0.95


def optimised(content: bytes, path: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


@pytest.mark.parametrize("width", [1.6, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("scheme", ["mid_tread", "mid_rise"])
def test_large_linear_layers_run_in_blocks_that_are_ready_at_load(width, scheme, tmp_path) -> None:
    module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    x = images(2, 512)
    packed = weights_only(module, x, widths=(width,), schemes=(scheme,))
    content = onnx_bytes(packed.model, {})
    assert len(content) < packed.size_bytes * 1.05 + 24000
    names = [node.op_type for node in optimised(content, tmp_path / "o.onnx").graph.node]
    assert names.count("MatMulNBits") == 2
    assert not {"Mod", "Gather", "DequantizeLinear", "MatMul"} & set(names)
    (mine,) = runner_of(content, tmp_path)([x])
    (wanted,) = run_packed(packed, (x,))
    assert float((mine - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_integer_convolutions_keep_nothing_to_unpack_at_run_time(tmp_path) -> None:
    model = random_model(
        Residual(), images(2, 3, 8, 8), widths=(2, 3, 4, 5), schemes=("mid_tread",)
    )
    content = onnx_bytes(model, {})
    names = {node.op_type for node in optimised(content, tmp_path / "o.onnx").graph.node}
    assert "QLinearConv" in names
    assert not {"Mod", "Conv", "QLinearAdd"} & names
    types = {x.data_type for x in onnx.load_from_string(content).graph.initializer}
    assert {onnx.TensorProto.INT4, onnx.TensorProto.INT2, onnx.TensorProto.UINT8} <= types


def fuzz(seed: int, arithmetic: str) -> None:
    """A small network of random geometry, widths, schemes and activation widths."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2]))
    channels = int(rng.choice([1, 2, 4])) * groups
    layers: list[nn.Module] = [nn.Conv2d(3, channels, int(rng.integers(1, 4)), padding=1)]
    for _ in range(int(rng.integers(0, 3))):
        out = int(rng.choice([1, 2, 3])) * groups
        kernel, stride = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        padding, dilation = int(rng.integers(0, 3)), int(rng.integers(1, 3))
        layers += [
            [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.MaxPool2d(2, 1)][rng.integers(4)],
            nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups),
        ]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(int(rng.integers(1, 3))), nn.Flatten()]
    x = images(2, 3, 17, 18, seed=seed)
    layers.append(nn.Linear(nn.Sequential(*layers)(x).shape[1], int(rng.integers(1, 5))))
    model = random_model(
        nn.Sequential(*layers), x, seed=seed, widths=BIT_WIDTHS, activation_bits=(2, 4, 8)
    )
    assert_equal(model, (x,), arithmetic)


@pytest.mark.parametrize("seed", range(30))
def test_random_networks(seed: int, arithmetic: str) -> None:
    fuzz(seed, arithmetic)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 330))
def test_many_random_networks(seed: int, arithmetic: str) -> None:
    fuzz(seed, arithmetic)


def test_removed_channels_are_not_in_the_file(arithmetic: str) -> None:
    x = images(2, 3, 8, 8)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    model = random_model(module, x)
    first, second = model.graph.layers
    widths = tuple(0.0 if i % 2 else 4.0 for i in range(8))
    rng = np.random.default_rng(0)
    layer = reference_models.random_layer(first, widths, rng, exact=False, scheme="mid_tread")
    quants = dict(model.candidate.layers) | {first.name: LayerQuant(widths)}
    candidate = Candidate.of(quants, dict(model.candidate.activations))
    layers = {**model.layers, first.name: layer}
    pruned = repacked(replace(model, candidate=candidate, layers=layers))
    smaller = reduced_model(pruned).graph.layer_of
    assert smaller[first.name].weight_shape == (4, 3, 3, 3)
    assert smaller[second.name].weight_shape == (4, 4, 3, 3)
    written = assert_equal(pruned, (x,), arithmetic)
    sizes = [np.prod(x.dims) for x in written.graph.initializer]
    assert max(sizes) <= 4 * 4 * 9


def test_what_cannot_be_written_is_said_with_name_reason_and_alternative() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).topk(3, dim=1).values

    packed = weights_only(Sorted(), images(2, 8))
    (refusal, *_) = write_network(reduced_model(packed.model)).refusals
    assert "topk.default" in str(refusal)
    assert "packed or torch" in refusal.instead
