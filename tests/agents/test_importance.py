"""Five criteria on numbers whose answer is known; ties share a rank."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agents.importance import CRITERIA, Importance
from agents.problem import Problem
from quant_ops.sensitivity import sampled_label_gradient
from quant_ops.weight_gradients import hessian_traces
from search.capture import trace
from search.choices import build_space
from search.config import RunConfig
from search.prepare import prepare
from search.strategy import ChannelFacts
from search.testing import AdditiveTask, FakeContext

FACTS = ChannelFacts(
    weights=np.array([[3.0, -4.0], [0.0, 1.0], [-7.0, 0.0]]),
    gamma=np.array([0.5, 2.0, 1.0]),
    taylor=np.array([9.0, 1.0, 4.0]),
    trace=np.array([2.0, 2.0, 2.0]),
)


@pytest.mark.parametrize(
    ("criterion", "scores"),
    [
        ("weight-sum", [7, 1, 7]),
        ("weight-norm", [5, 1, 7]),
        ("norm-scale", [0.5, 2, 1]),
        ("taylor", [9, 1, 4]),
        # steps 4/7, 1/7, 1: 3 is 5.25 steps, everything else lies on the grid
        ("hessian-error", [(0.25 * 4 / 7) ** 2, 0, 0]),
    ],
)
def test_criterion_is_its_formula(criterion, scores):
    assert CRITERIA[criterion](FACTS) == pytest.approx(np.array(scores, float))


def test_the_trace_is_the_mean_square_of_the_samples_gradients():
    # one linear layer: dL/dw[c] = (p - label)[c] x, so that it has a closed form
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x = torch.randn(512, 3)
    traced = trace(model.eval(), (x,))
    (name,) = traced.graph.layer_of
    batches = [((rows,), None) for rows in x.split(4)]
    found = hessian_traces(traced.graph, traced.params, batches, sampled_label_gradient)[name]
    with torch.no_grad():
        share = model(x).softmax(1)
        spread = share * (1 - share)  # variance of the label's indicator
        wanted = (spread * x.square().sum(1, keepdim=True)).mean(0).numpy()
    assert found == pytest.approx(wanted, rel=0.1)


def test_taylor_is_half_the_mean_square_of_what_a_channel_does_to_the_logits(tiny_evaluator):
    evaluator = tiny_evaluator
    facts = evaluator.channel_facts()
    losses = evaluator.channel_losses({name: (0.0,) for name in facts})
    for name, fact in facts.items():
        assert fact.taylor == pytest.approx(losses[name][0][:, 0])
        assert fact.weights.shape[0] == len(fact.gamma) == len(fact.trace)
    # batch norm was folded into the first layer: its scale is what the criterion sees
    first = next(iter(facts.values()))
    assert (first.gamma != 1).any()


@pytest.fixture
def tiny_evaluator(tiny_tasks):
    config = RunConfig(probe_samples=64, search_samples=64)
    return prepare(tiny_tasks.cnn(), config).evaluator


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.inner, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = self.one(x).relu()
        return self.head(self.inner(x + self.two(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def ranked():
    torch.manual_seed(0)
    traced = trace(Residual().eval(), (torch.randn(2, 3, 8, 8),))
    space = build_space(traced.graph, RunConfig(granularity="channel"))
    rng = np.random.default_rng(0)
    facts = {}
    for layer in traced.graph.layers:
        n = layer.out_channels
        columns = (rng.normal(size=(n, 2)), np.ones(n), rng.random(n), rng.random(n))
        facts[layer.name] = ChannelFacts(*columns)
    return Importance.of(space, facts, "weight-sum")


def test_layers_that_lose_channels_together_rank_them_alike(ranked):
    assert ranked.channels["one"] == pytest.approx(ranked.channels["two"])
    assert list(ranked.order["one"]) == list(ranked.order["two"])


def test_importance_is_relative_to_the_layer(ranked):
    for scores in ranked.channels.values():
        assert scores.mean() == pytest.approx(1.0)


def test_order_is_from_the_least_important_on(ranked):
    for name, order in ranked.order.items():
        assert (np.diff(ranked.genes[name][order]) >= 0).all()


def test_an_unknown_criterion_is_refused(ranked):
    with pytest.raises(ValueError, match="importance must be one of weight-sum"):
        Importance.of(None, {}, "magic")


def test_where_layers_were_measured_alone_their_table_says_what_each_matters():
    task = AdditiveTask.make(n_layers=4, n_groups=4, widths=(0.0, 1.0, 2.0, 3.0, 4.0, 8.0), seed=5)
    context = FakeContext(task)
    by_criterion = Problem.of(context, "taylor", 3).importance
    (known,) = context.evaluate([task.space.uniform(4)])
    context.answered[known.candidate] = replace(known, strategy="rate-distortion")
    measured = Problem.of(context, "taylor", 3).importance
    for layer in task.space.layers:  # the loss of a layer alone is its sensitivity x 4^-width
        assert measured.levels[layer.name] == pytest.approx(task.sensitivity[layer.name] / 8)
        assert np.array_equal(measured.genes[layer.name], by_criterion.genes[layer.name])
    assert measured.levels != by_criterion.levels


def test_a_table_without_widths_that_tell_layers_apart_leaves_the_criterion():
    task = AdditiveTask.make(n_layers=4, n_groups=4, widths=(0.0, 8.0), seed=5)
    context = FakeContext(task)
    by_criterion = Problem.of(context, "taylor", 3).importance
    (known,) = context.evaluate([task.space.uniform(8)])
    context.answered[known.candidate] = replace(known, strategy="rate-distortion")
    assert Problem.of(context, "taylor", 3).importance.levels == by_criterion.levels
