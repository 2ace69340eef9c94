"""What the search measures is what the file does."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant_ops.candidate import Candidate
from quant_ops.packed import PackedModel
from search.config import RunConfig
from search.finish import measure_packed
from search.prepare import prepare
from search.verify import first_difference

NAMES = ("cnn", "zoo", "regression")


@pytest.fixture(scope="module")
def prepared(tiny_tasks):
    made = {
        name: prepare(getattr(tiny_tasks, name)(), RunConfig(granularity="channel", threads=1))
        for name in NAMES
    }
    return lambda name: made[name]


def read_back(prepared, candidate, path):
    PackedModel.from_model(prepared.evaluator.bank.quantize(candidate)).save(path)
    return PackedModel.load(path)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6))
def test_file_and_search_agree_on_bytes_codes_and_quality(prepared, tmp_path, name, seed):
    ready = prepared(name)
    candidate = ready.space.sample(np.random.default_rng(seed))
    (evaluation,) = ready.evaluator.evaluate_many([candidate])
    packed = read_back(ready, candidate, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size == evaluation.size_bytes
    assert first_difference(packed.model, ready.evaluator.bank.quantize(candidate)) is None
    measured = measure_packed(ready, packed, "search")
    assert measured.loss == pytest.approx(evaluation.loss, rel=1e-4, abs=1e-9)
    if name == "cnn":  # where channels are removed sums have another order
        assert measured.metric == pytest.approx(evaluation.metric, abs=1 / 400 + 1e-9)


def test_codes_scales_and_biases_of_file_and_search_are_equal(prepared, tmp_path):
    ready = prepared("cnn")
    candidate = ready.space.uniform(3)
    mine = ready.evaluator.bank.quantize(candidate)
    packed = read_back(ready, candidate, tmp_path / "x.safetensors")
    params = ready.evaluator.bank.params(candidate)
    for (name, theirs), stored in zip(
        mine.layers.items(), packed.model.layers.values(), strict=True
    ):
        layer = ready.traced.graph.layer_of[name]
        np.testing.assert_array_equal(stored.codes, theirs.codes)
        np.testing.assert_array_equal(stored.channel_scales(), theirs.channel_scales())
        assert torch.equal(stored.bias_values(), theirs.bias_values())
        assert torch.equal(stored.weight(layer), params[layer.weight])
        assert torch.equal(stored.bias_values(), params[layer.bias])


def test_the_float_model_loses_nothing_and_agrees_with_itself(prepared, tiny_tasks):
    ready = prepared("cnn")
    evaluator = ready.evaluator
    measured = evaluator.measure_float(evaluator.judge("validation"))
    assert measured.loss == pytest.approx(0, abs=1e-9)
    assert measured.agreement == 1
    task = tiny_tasks.cnn()
    (inputs,), labels = task.validation[0]
    with torch.no_grad():
        wanted = (task.model(inputs).argmax(dim=1) == labels).double().mean()
    assert measured.metric == float(wanted)


def test_the_loss_is_the_mean_divergence_from_the_float_model(prepared):
    ready = prepared("cnn")
    evaluator, candidate = ready.evaluator, ready.space.uniform(2)
    params = evaluator.bank.params(candidate)
    divergences = []
    for inputs in ready.spec.splits["search"].inputs():
        logits = [evaluator._run(p, {}, inputs).double() for p in (ready.traced.params, params)]
        p, q = (x.log_softmax(dim=1) for x in logits)
        divergences.append((p.exp() * (p - q)).sum(dim=1))
    wanted = torch.cat(divergences)
    measured = evaluator.measure(candidate)
    assert measured.loss == pytest.approx(float(wanted.mean()), rel=1e-6)
    assert measured.loss_stderr == pytest.approx(float(wanted.std() / len(wanted) ** 0.5), rel=1e-6)


def test_a_metric_of_the_whole_split_sees_all_of_it(prepared, tiny_tasks):
    ready = prepared("regression")
    task = tiny_tasks.regression()
    (inputs,), targets = task.validation[0]
    with torch.no_grad():
        wanted = task.metric.function(task.model(inputs), targets)
    measured = ready.evaluator.measure_float(ready.evaluator.judge("validation"))
    assert measured.metric == pytest.approx(wanted, abs=1e-6)
    assert measured.agreement is None


def test_a_layer_that_a_candidate_does_not_name_stays_float(prepared):
    evaluator = prepared("cnn").evaluator
    nothing = evaluator.measure(Candidate.of({}), "probe")
    assert nothing.loss == pytest.approx(0, abs=1e-9)
    name = prepared("cnn").traced.graph.searchable_layers[0].name
    assert evaluator.measure(Candidate.of({name: 1}), "probe").loss > 1e-3


def test_outputs_that_are_not_finite_are_infinitely_bad(prepared):
    evaluator = prepared("cnn").evaluator
    judge = evaluator.judge("probe")
    run = iter([x * math.nan for x in judge.float_outputs])
    measured = judge.measure(lambda inputs: next(run))
    assert measured.loss == math.inf
    assert measured.loss_stderr == math.inf
    assert measured.agreement == 0


def test_eight_bit_activations_run_as_integers_and_change_little(tiny_tasks, tmp_path):
    ready = prepare(tiny_tasks.cnn(), RunConfig(activation_bits=(8,), threads=1))
    candidate = ready.space.uniform(8)
    assert set(candidate.activation_bits.values()) == {8}
    simulated = ready.evaluator.measure(candidate, "validation")
    packed = read_back(ready, candidate, tmp_path / "x.safetensors")
    exact = measure_packed(ready, packed, "validation")
    again = measure_packed(ready, packed, "validation")
    assert exact == again
    assert exact.metric == pytest.approx(simulated.metric, abs=0.01)
    assert exact.loss < 0.01
