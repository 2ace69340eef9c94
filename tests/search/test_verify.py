"""`verify` finds every difference that matters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quant_ops.errors import VerificationError
from quant_ops.packed import PackedModel
from quant_ops.stored import StoredBias
from search.config import RunConfig
from search.prepare import prepare
from search.vectors import TOLERANCE, Vectors, largest_difference, make_vectors
from search.verify import first_difference


@pytest.fixture(scope="module")
def ready(tiny_tasks):
    return prepare(tiny_tasks.cnn(), RunConfig(threads=1))


@pytest.fixture
def model(ready):
    return ready.evaluator.bank.quantize(ready.space.uniform(4))


@pytest.fixture
def inputs(ready):
    return ready.spec.splits["validation"].batches[0][0]


def changed(model, name, **fields):
    return replace(model, layers={**model.layers, name: replace(model.layers[name], **fields)})


def test_a_model_equals_itself(ready, model):
    assert first_difference(model, ready.evaluator.bank.quantize(model.candidate)) is None


def test_one_code_one_scale_or_one_bias_is_found(ready, model):
    name = next(iter(model.layers))
    layer = model.layers[name]
    codes = layer.codes.copy()
    codes[0, 0] += 1 if codes[0, 0] < 0 else -1
    assert first_difference(model, changed(model, name, codes=codes)) == name
    (width, scale), *_ = layer.scales.items()
    ratio = scale.ratio.copy()
    ratio[0] += 1
    scales = {width: replace(scale, ratio=ratio)}
    assert first_difference(model, changed(model, name, scales=scales)) == name
    bias = StoredBias(layer.bias.base, layer.bias.codes + np.int16(1))
    assert first_difference(model, changed(model, name, bias=bias)) == name
    other = ready.evaluator.bank.quantize(ready.space.uniform(5))
    assert first_difference(model, other) == name


def test_activation_quantizers_are_compared(tiny_tasks):
    ready = prepare(tiny_tasks.mlp(), RunConfig(activation_bits=(8,), threads=1))
    model = ready.evaluator.bank.quantize(ready.space.uniform(4))
    edge, quantizer = next(iter(model.activations.items()))
    other = replace(
        model,
        activations={**model.activations, edge: replace(quantizer, scale=quantizer.scale * 2)},
    )
    assert first_difference(model, other) == "the activation quantizers"


def test_vectors_of_a_model_come_back_and_fit(model, inputs, tmp_path):
    packed = PackedModel.from_model(model)
    vectors = make_vectors(packed, inputs)
    vectors.save(tmp_path / "v")
    again = Vectors.load(tmp_path / "v", packed.digest)
    assert len(again.inputs[0]) == 32
    assert torch.equal(again.outputs[0], vectors.outputs[0])
    assert largest_difference(packed, again) == 0


def test_vectors_of_another_model_do_not_fit(ready, model, inputs):
    vectors = make_vectors(PackedModel.from_model(model), inputs)
    other = PackedModel.from_model(ready.evaluator.bank.quantize(ready.space.uniform(5)))
    assert largest_difference(other, vectors) > TOLERANCE
    fewer = replace(vectors, outputs=(vectors.outputs[0][:, :3],))
    with pytest.raises(VerificationError, match="outputs of shape"):
        largest_difference(other, fewer)
    more = replace(vectors, outputs=vectors.outputs * 2)
    with pytest.raises(VerificationError, match="has 1 outputs, its test vectors have 2"):
        largest_difference(other, more)


def test_outputs_that_are_not_numbers_do_not_pass(model, inputs):
    packed = PackedModel.from_model(model)
    vectors = make_vectors(packed, inputs)
    broken = replace(vectors, outputs=(vectors.outputs[0] * float("nan"),))
    assert not largest_difference(packed, broken) <= TOLERANCE
