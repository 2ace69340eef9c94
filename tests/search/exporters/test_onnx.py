"""ONNX models, executed, against the reference with ONNX Runtime's rounding: equal bit for bit."""

import importlib.util
from collections.abc import Callable
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
from search.exporters.onnx_graph.network import write_network
from search.exporters.onnx_runtime import onnx_bytes, runner_of
from search.vectors import run_packed

REFERENCE_TESTS = Path(__file__).parents[2] / "quant_ops" / "test_reference.py"
_spec = importlib.util.spec_from_file_location("reference_models", REFERENCE_TESTS)
assert _spec is not None
assert _spec.loader is not None
reference_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_models)


def with_batch(x: Tensor, n: int) -> Tensor:
    return x[:1].expand(n, *x.shape[1:]).contiguous() + 0.1 * torch.randn(n, *x.shape[1:])


def assert_equal_to_mode(model: QuantizedModel, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    smaller = reduced_model(model)
    program = lower(smaller)
    assert program.float_islands == ()
    full = run_torch(lower(model), [x.numpy() for x in inputs])
    less = run_torch(program, [x.numpy() for x in inputs])
    for a, b in zip(full.values, less.values, strict=True):
        np.testing.assert_array_equal(a, b)
    content = onnx_bytes(model, {})
    run = runner_of(content, Path("model.onnx"))
    for batch in (inputs, tuple(with_batch(x, 3) for x in inputs)):
        wanted = run_runtime_mode(program, [x.numpy() for x in batch]).values
        for mine, expected in zip(run(batch), wanted, strict=True):
            np.testing.assert_array_equal(mine.numpy(), expected)
    return onnx.load_from_string(content)


def random_model(module: nn.Module, *inputs: Tensor, seed: int = 0, **options: object):
    traced = trace(module, inputs)
    rng = np.random.default_rng(seed)
    return reference_models.random_model(traced, inputs, rng, exact=False, **options)


def check(module: nn.Module, *inputs: Tensor, seeds: int = 1, **options: object) -> None:
    for seed in range(seeds):
        model = random_model(module, *inputs, seed=seed, **options)
        assert_equal_to_mode(model, inputs)


images = reference_models.images


@pytest.mark.parametrize("case", reference_models.CONVOLUTIONS)
def test_every_convolution_with_every_width(case: str) -> None:
    module, shape = reference_models.CONVOLUTIONS[case]
    check(module, images(*shape), seeds=2, widths=BIT_WIDTHS)


@pytest.mark.parametrize("case", reference_models.FUNCTIONS)
def test_every_operator_with_an_integer_form(case: str) -> None:
    function = reference_models.FUNCTIONS[case]
    module = reference_models.Through(function)
    check(module, images(2, 3, 6, 6), seeds=2, activation_bits=(4, 8))


@pytest.mark.parametrize("case", reference_models.AVERAGES)
def test_every_average(case: str) -> None:
    def average(x: Tensor) -> Tensor:
        return reference_models.AVERAGES[case](x) + 0.0

    check(reference_models.Through(average), images(3, 3, 7, 6))
