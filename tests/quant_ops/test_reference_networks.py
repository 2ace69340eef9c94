"""Whole networks as integer programs against the oracle, with float islands and at random."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_oracle import (
    Residual,
    Rng,
    assert_both_engines_agree,
    assert_equals_oracle,
    check,
    images,
    random_model,
)
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.executor import Executor, Transform
from quant_ops.lowering import lower
from quant_ops.program import IntegerProgram
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.reference import fake_quant_transforms, run, run_torch
from quant_ops.stored import StoredScale
from search.capture import trace


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
