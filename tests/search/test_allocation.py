"""The integer program against enumeration and against the published ResNet-18 optima."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.allocation import allocate, allocate_many, sweep, total

TIES = ((4, 6), (9, 11), (14, 16))  # the two inputs of one residual addition
OPTIMA = [
    ("size", 0.25, -1.189414, "8888888888888844444"),
    ("size", 0.50, -1.233207, "8888888888888884844"),
    ("size", 0.75, -1.274273, "8888888888888488884"),
    ("bops", 0.25, -0.847289, "8884848444444444444"),
    ("bops", 0.50, -1.092024, "8884888848884444444"),
    ("bops", 0.75, -1.227748, "8888888848888484884"),
    ("latency", 0.25, -0.847289, "8884848444444444444"),
    ("latency", 0.50, -1.105039, "8888848848884484844"),
    ("latency", 0.75, -1.227748, "8888888848888484884"),
]


@pytest.fixture(scope="module")
def hawq():
    """Groups of tied layers, their losses and costs at (4, 8) bits."""
    data = json.loads((Path(__file__).parent / "data" / "hawq_resnet18.json").read_text())
    trace = np.array(data["Hutchinson_trace"])
    narrow = np.zeros(len(trace))
    change = trace * (
        np.array(data["delta_weights_8bit_square"]) - np.array(data["delta_weights_4bit_square"])
    )
    weights, bops = np.array(data["parameters"]), np.array(data["bops"])
    tables = {
        "loss": (narrow, change),
        "size": (weights / 2, weights),
        "bops": (bops * 16, bops * 64),
        "latency": (np.array(data["latency_int4"]), np.array(data["latency_int8"])),
    }
    tied = {late: early for early, late in TIES}
    groups = [
        [i, *(late for late, early in tied.items() if early == i)]
        for i in range(len(trace))
        if i not in tied
    ]
    grouped = {
        name: [np.array([sum(column[i] for i in g) for column in table]) for g in groups]
        for name, table in tables.items()
    }
    return groups, grouped


@pytest.mark.parametrize(("budget", "ratio", "objective", "bit_widths"), OPTIMA)
def test_resnet18_optima_of_hawq_v3_are_reproduced(hawq, budget, ratio, objective, bit_widths):
    groups, tables = hawq
    low = sum(float(g[0]) for g in tables[budget])
    high = sum(float(g[1]) for g in tables[budget])
    choice = allocate(
        tables["loss"], {budget: tables[budget]}, {budget: low + ratio * (high - low)}
    )
    assert choice is not None
    assert total(tables["loss"], choice) == pytest.approx(objective, abs=1e-6)
    at = {layer: pick for group, pick in zip(groups, choice, strict=True) for layer in group}
    assert "".join("48"[at[i]] for i in range(19)) == bit_widths


@st.composite
def instances(draw, n_costs=1):
    n_groups = draw(st.integers(1, 5))
    n_choices = draw(st.lists(st.integers(1, 4), min_size=n_groups, max_size=n_groups))
    number = st.integers(0, 1000)

    def table():
        return [
            np.array(draw(st.lists(number, min_size=n, max_size=n)), dtype=float) for n in n_choices
        ]

    costs = {f"cost{i}": table() for i in range(n_costs)}
    limits = {name: float(draw(st.integers(0, 1000 * n_groups))) for name in costs}
    return table(), costs, limits


def enumerate_best(losses, costs, limits):
    best = None
    for choice in itertools.product(*(range(len(g)) for g in losses)):
        if all(total(costs[name], choice) <= limit for name, limit in limits.items()):
            loss = total(losses, choice)
            best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("n_costs", [1, 2])
def test_allocation_equals_enumeration(n_costs):
    @given(instances(n_costs))
    @settings(max_examples=100, deadline=None)
    def check(instance):
        losses, costs, limits = instance
        choice = allocate(losses, costs, limits)
        best = enumerate_best(losses, costs, limits)
        if best is None:
            assert choice is None
        else:
            assert choice is not None
            assert all(total(costs[name], choice) <= limit for name, limit in limits.items())
            assert total(losses, choice) == best

    check()


@given(instances(), st.floats(0, 100))
@settings(max_examples=100, deadline=None)
def test_sweep_minimises_the_lagrangian_for_every_multiplier(instance, multiplier):
    losses, costs, _ = instance
    sizes = costs["cost0"]

    def lagrangian(choice):
        return total(losses, choice) + multiplier * total(sizes, choice)

    front = sweep(losses, sizes)
    best = sum(
        float((loss + multiplier * size).min()) for loss, size in zip(losses, sizes, strict=True)
    )
    assert min(map(lagrangian, front)) == pytest.approx(best)


@given(instances())
@settings(max_examples=100, deadline=None)
def test_sweep_runs_from_the_smallest_to_the_least_loss_and_is_convex(instance):
    losses, costs, _ = instance
    sizes = costs["cost0"]
    front = sweep(losses, sizes)
    points = np.array([(total(sizes, c), total(losses, c)) for c in front])
    assert points[0, 0] == sum(g.min() for g in sizes)
    assert points[-1, 1] == sum(g.min() for g in losses)
    assert np.all(np.diff(points[:, 0]) > 0)
    gains = -np.diff(points[:, 1]) / np.diff(points[:, 0])
    assert np.all(np.diff(gains) <= 1e-9)


def test_no_group_more_than_its_cheapest_choice_is_infeasible():
    losses = [np.array([1.0, 0.0])] * 3
    sizes = {"size": [np.array([2.0, 3.0])] * 3}
    answers = allocate_many(losses, sizes, [{"size": 5}, {"size": 6}, {"size": 9}])
    assert answers == [None, (0, 0, 0), (1, 1, 1)]


def test_losses_that_are_not_finite_are_avoided_where_possible():
    losses = [np.array([np.inf, 1.0, np.nan]), np.array([np.nan, 3.0, 2.0])]
    sizes = {"size": [np.array([0.0, 1.0, 2.0])] * 2}
    assert allocate(losses, sizes, {"size": 4}) == (1, 2)
    assert allocate(losses, sizes, {"size": 2}) == (1, 1)
    assert sweep(losses, sizes["size"])[-1] == (1, 2)


def test_small_differences_survive_beside_huge_losses():
    rng = np.random.default_rng(0)
    losses = [np.array([1e3, 1e-4 * (1 + rng.random()), 1e-6]) for _ in range(12)]
    sizes = [np.array([10.0, 40.0, 41.0 + g]) for g in range(12)]
    limit = 12 * 40 + 10
    choice = allocate(losses, {"size": sizes}, {"size": limit})
    assert total(losses, choice) == pytest.approx(
        min(
            sum(losses[g][2 if g in upgraded else 1] for g in range(12))
            for n in range(6)
            for upgraded in itertools.combinations(range(12), n)
            if sum(sizes[g][2 if g in upgraded else 1] for g in range(12)) <= limit
        ),
        rel=1e-9,
    )
