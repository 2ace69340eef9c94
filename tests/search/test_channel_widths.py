"""Every rule against its closed form or against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.channel_widths import RULES, GroupTable, greedy, lagrangian, level_for, water_filling

WIDTHS = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8])


def group(scale: float, weights: float = 64, spread: float = 1.0, widths=WIDTHS) -> GroupTable:
    return GroupTable(widths, scale * 4.0**-widths, widths * weights, spread)


def total(groups, choice, what):
    return sum(getattr(g, what)[at] for g, at in zip(groups, choice, strict=True))


def test_water_filling_gives_the_gaussian_solution():
    # loss per weight h a^2: half a bit more for every doubling
    groups = [group(2.0**k * 64) for k in (0, 2, 4, 6)]
    assert water_filling(groups, 2.0) == [2, 3, 4, 5]
    assert water_filling(groups, -1.0) == [0, 0, 1, 2]  # what would be negative is 0


def test_two_thirds_ignores_the_outputs():
    groups = [group(5.0, spread=1.0), group(0.1, spread=8.0)]
    assert RULES["two-thirds"](groups, 2.0) == [2, 4]


@pytest.mark.parametrize("rule", [greedy, lagrangian])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=3),
    st.lists(st.sampled_from([8.0, 16.0, 64.0]), min_size=3, max_size=3),
    st.floats(0.1, 0.9),
)
def test_no_choice_of_the_same_size_is_better(rule, scales, weights, share):
    widths = np.array([0.0, 1.0, 2.0, 4.0])
    groups = [group(s, w, widths=widths) for s, w in zip(scales, weights, strict=False)]
    limit = share * sum(float(g.bits[-1]) for g in groups)
    found = level_for(rule, groups, lambda c: total(groups, c, "bits") <= limit)
    assert found is not None
    size = total(groups, found, "bits")
    everything = itertools.product(range(len(widths)), repeat=len(groups))
    best = min(total(groups, c, "losses") for c in everything if total(groups, c, "bits") <= size)
    assert total(groups, found, "losses") <= best * (1 + 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_the_level_fills_the_file_and_never_overfills_it(rule):
    rng = np.random.default_rng(0)
    groups = [group(10.0 ** rng.uniform(-2, 2), spread=rng.uniform(0.5, 2)) for _ in range(60)]
    largest = sum(float(g.bits[-1]) for g in groups)
    for share in (0.1, 0.37, 0.8):
        found = level_for(
            RULES[rule], groups, lambda c, limit=share * largest: total(groups, c, "bits") <= limit
        )
        assert 0.9 * share * largest < total(groups, found, "bits") <= share * largest
    assert level_for(RULES[rule], groups, lambda c: False) is None
    assert level_for(RULES[rule], groups, lambda c: True) == [8] * 60


def test_measured_losses_decide_where_the_law_fails():
    # one more bit is worth nothing here, whatever 4^-b says
    stuck = GroupTable(WIDTHS, np.array([1.0] + [0.5] * 8), WIDTHS * 64, 1.0)
    assert greedy([stuck], 30.0) == [1]
    assert lagrangian([stuck], 30.0) == [1]
