"""Sharing what networks have in common changes no bit of any result."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from quant_ops.executor import Executor
from search.config import RunConfig
from search.prefix import PrefixRunner
from search.prepare import prepare
from search.task import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.three = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = functional.relu(self.one(x))
        x = functional.relu(x + self.three(functional.relu(self.two(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    x = torch.randn(60, 1, 8, 8)
    batches = [((x[:40],), torch.arange(40) % 4), ((x[40:],), torch.arange(20) % 4)]
    task = Task("net", Net().eval(), calibration=batches, validation=batches)
    return prepare(task, RunConfig(activation_bits=(4, 8)))


def test_many_at_once_are_measured_as_one_by_one(prepared):
    generator = np.random.default_rng(0)
    candidates = [prepared.space.sample(generator) for _ in range(12)]
    candidates += [candidates[3], prepared.space.uniform(4)]
    evaluator = prepared.evaluator
    assert evaluator.measure_many(candidates) == [evaluator.measure(c) for c in candidates]


class Counting(Executor):
    """Counts nodes that are computed."""

    def __init__(self, graph):
        super().__init__(graph)
        self.computed = []

    def run(self, params, inputs, *, start=0, **rest):
        self.computed.append(len(self.graph.nodes) - start)
        return super().run(params, inputs, start=start, **rest)


def test_only_what_differs_is_computed(prepared):
    executor = Counting(prepared.traced.graph)
    space, bank = prepared.space, prepared.evaluator.bank
    base = space.uniform(8)
    changed = [base, base.replace({"head": 2}), base.replace({"three": 2})]
    networks = [(bank.params(c), {}) for c in changed]
    inputs = (torch.randn(5, 1, 8, 8),)
    list(PrefixRunner(executor).run(networks, inputs))
    graph = prepared.traced.graph
    sites = [graph.layer_of[name].sites[0] for name in ("head", "three")]
    whole = len(graph.nodes)
    # the third departs from the second where the third layer of the network begins
    assert executor.computed == [whole, whole - sites[0], whole - sites[1]]


def test_without_memory_everything_is_computed_again(prepared):
    executor = Counting(prepared.traced.graph)
    bank, base = prepared.evaluator.bank, prepared.space.uniform(8)
    networks = [(bank.params(c), {}) for c in (base, base.replace({"head": 2}))]
    list(PrefixRunner(executor, memory_bytes=0).run(networks, (torch.randn(5, 1, 8, 8),)))
    assert executor.computed == [len(prepared.traced.graph.nodes)] * 2
