"""How good the answers are, on a task whose optimum is known."""

import numpy as np
import pytest

from search.allocation import allocate, total
from search.strategies.distortion import measure_table
from search.strategies.ranking import front_of
from search.strategies.surrogate import GeneTable, fitted_weights
from search.strategies.table import make_strategy
from search.strategies.uniform import uniform_candidates
from search.testing import AdditiveTask, FakeContext, mid_budget, run_to_end


def optimum(task, budget):
    """Loss of the best candidate: the task is additive, so the integer program is exact."""
    space, weights = task.space, task.space.graph.layer_of
    widths = [np.array(choice.bit_widths) for choice in space.layers]
    losses = [task.sensitivity[c.name] * 4.0**-w for c, w in zip(space.layers, widths, strict=True)]
    sizes = [
        np.ceil(weights[c.name].n_weights * w / 8)
        for c, w in zip(space.layers, widths, strict=True)
    ]
    choice = allocate(losses, {"size": sizes}, {"size": budget - 100})
    return total(losses, choice)


@pytest.fixture(scope="module", params=[0, 1])
def task(request):
    return AdditiveTask.make(n_layers=12, seed=request.param)


@pytest.fixture(scope="module")
def auto_record(task):
    context = FakeContext(task, {"size_bytes": mid_budget(task)}, trials=100, batch_size=8)
    return run_to_end(make_strategy("auto"), context)


def best_at(record, size_bytes):
    return min(e.loss for e in record if e.size_bytes <= size_bytes)


@pytest.mark.parametrize("name", ["rate-distortion", "auto"])
def test_the_optimum_at_the_budget_is_found(task, name):
    budget = mid_budget(task)
    context = FakeContext(task, {"size_bytes": budget}, trials=60)
    record = run_to_end(make_strategy(name), context)
    assert best_at(record, budget) == pytest.approx(optimum(task, budget), rel=1e-9)


def test_auto_is_never_worse_than_uniform_at_equal_bytes(task, auto_record):
    for candidate in uniform_candidates(task.space):
        assert best_at(auto_record, task.size_bytes(candidate)) <= task.loss(candidate)


def test_auto_is_close_to_the_optimum_at_every_size_between_its_points(task, auto_record):
    budget = mid_budget(task)
    for size in np.geomspace(1.1 * task.size_bytes(task.space.smallest()), budget, 20):
        assert best_at(auto_record, size) <= 1.25 * optimum(task, size)


def test_rate_distortion_probes_each_choice_once(task):
    context = FakeContext(task, {"size_bytes": mid_budget(task)})
    run_to_end(make_strategy("rate-distortion"), context)
    assert context.n_probes == sum(len(choice.bit_widths) for choice in task.space.layers)


def test_surrogate_finds_the_factors_that_the_probes_missed(task):
    context = FakeContext(task)
    record = run_to_end(make_strategy("random"), FakeContext(task, trials=120, batch_size=8))
    table = measure_table(context)
    factors = np.random.default_rng(0).uniform(0.5, 2.0, len(table.losses))
    wrong = GeneTable.of(table.rescaled((1 / factors).tolist()))
    size = np.median([e.size_bytes for e in record])
    weights = fitted_weights(task.space, wrong, record, size)
    near = sorted(record, key=lambda e: abs(np.log2(e.size_bytes / size)))[:40]
    for_each = [wrong.loss_by_group(task.space.encode(e.candidate)) for e in near]
    measured = np.array([e.loss for e in near])
    before = np.abs(np.log(np.array([row.sum() for row in for_each]) / measured))
    after = np.abs(np.log(np.array([weights @ row for row in for_each]) / measured))
    assert after.mean() < 0.3 * before.mean()


def test_front_of_keeps_only_what_is_inside_every_budget(task, auto_record):
    budgets = {"size_bytes": mid_budget(task)}
    front = front_of(auto_record, budgets)
    sizes, losses = [e.size_bytes for e in front], [e.loss for e in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert sizes[-1] <= budgets["size_bytes"]
