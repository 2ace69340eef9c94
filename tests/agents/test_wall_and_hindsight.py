"""Every episode ends legal, and what is remembered of it is exact under any budget."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS, Episode, share_and_width
from agents.problem import Problem
from agents.retrace import GOAL_WEIGHT, retrace
from agents.reward import Baseline
from agents.wall import Wall
from quant_ops.candidate import Candidate
from search.evaluation import Evaluation, within
from search.testing import AdditiveTask, FakeContext

WIDTHS = (0.0, 1.0, 1.6, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
ANY = AdditiveTask.make(n_layers=5, n_groups=8, widths=WIDTHS, seed=2)
# the last two layers may vanish as a whole, the others keep a channel
LAYERS = tuple(replace(x, may_vanish=i > 2) for i, x in enumerate(ANY.space.layers))
TASK = replace(ANY, space=replace(ANY.space, layers=LAYERS))
CONTEXT = FakeContext(TASK)
PROBLEM = Problem.of(CONTEXT, "taylor", 3)
N = len(TASK.space.gene_widths)
SMALLEST, LARGEST = (TASK.size_bytes(c) for c in (TASK.space.smallest(), TASK.space.largest()))

genomes = st.lists(st.integers(0, len(WIDTHS) - 1), min_size=N, max_size=N).map(np.array)
budgets = st.floats(SMALLEST, LARGEST)
actions = st.lists(st.floats(-1, 1, width=32), min_size=60, max_size=60)


@pytest.mark.parametrize("order", ["bits", "channels", "layers"])
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(genome=genomes, budget=budgets)
def test_behind_the_wall_every_budget_holds(order, genome, budget):
    limits = {"size_bytes": budget, "bops": TASK.bops(TASK.space.uniform(6))}
    lowered = TASK.space.decode(Wall(PROBLEM, order).lower(CONTEXT, genome, limits))
    assert within(limits, CONTEXT.cost_of(lowered))
    assert TASK.space.contains(lowered)


@settings(max_examples=40, deadline=None)
@given(genome=genomes, budget=budgets)
def test_the_wall_only_takes_and_leaves_alone_what_fits(genome, budget):
    wall, limits = Wall(PROBLEM), {"size_bytes": budget}
    lowered = wall.lower(CONTEXT, genome, limits)
    if TASK.size_bytes(TASK.space.decode(genome)) <= budget:
        assert lowered == tuple(genome)
    elif lowered != TASK.space.encode(TASK.space.smallest()):
        assert (np.array(lowered) <= genome).all()
        assert TASK.size_bytes(TASK.space.decode(lowered)) <= budget


def test_the_wall_takes_from_the_least_important_first():
    wall = Wall(PROBLEM)
    lowered = np.array(wall.lower(CONTEXT, PROBLEM.widest, {"size_bytes": 0.75 * LARGEST}))
    scores = np.concatenate([layer.scores for layer in PROBLEM.layers])
    least_first = lowered[np.argsort(scores, kind="stable")]
    assert (np.diff(least_first) >= 0).all()
    assert least_first[0] < least_first[-1]


def test_an_estimate_that_is_wrong_does_not_matter():
    off = Problem.of(CONTEXT, "taylor", 3)
    off.size.fixed += 1000.0
    lowered = Wall(off).lower(CONTEXT, off.widest, {"size_bytes": LARGEST / 2})
    assert TASK.size_bytes(TASK.space.decode(lowered)) <= LARGEST / 2


def roll(budget, numbers, goals=None):
    """(episode, layer rows, channel rows) of an episode under given actions."""
    episode, numbers = Episode(PROBLEM, budget), iter(numbers)
    layers, channels = [], []
    while not episode.done:
        layers.append(episode.layer_observation())
        decision = episode.decision_of(next(numbers), next(numbers))
        if goals is not None:
            goals.append(decision.goal)
        at = episode.at
        episode.begin_layer(decision)
        while episode.at == at:
            channels.append(episode.channel_observation())
            episode.place(episode.width_of(next(numbers)))
    return episode, layers, channels


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_retracing_an_episode_sees_what_the_episode_saw(budget, numbers):
    goals = []
    episode, layers, channels = roll(budget, numbers, goals)
    trace = retrace(PROBLEM, episode.genome, budget, goals=goals)
    assert np.array_equal([t.observation for t in trace.layers], layers)
    assert np.allclose([t.observation for t in trace.channels], channels, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_widths_do_not_fall_with_importance(budget, numbers):
    genome = roll(budget, numbers)[0].genome
    for layer, choice in zip(PROBLEM.layers, LAYERS, strict=True):
        positions = genome[layer.start : layer.start + layer.n_genes][layer.order]
        assert (np.diff(positions) >= 0).all()
        assert positions.any() or choice.may_vanish


@settings(max_examples=60, deadline=None)
@given(budget=budgets, other=budgets, numbers=actions)
def test_hindsight_recomputes_what_depends_on_the_budget_and_nothing_else(budget, other, numbers):
    genome = roll(budget, numbers)[0].genome
    ours, theirs = retrace(PROBLEM, genome, budget), retrace(PROBLEM, genome, other)
    touched = {"budget", "even", "spent"}
    for fields, left, right in (
        (LAYER_FIELDS, ours.layers, theirs.layers),
        (CHANNEL_FIELDS, ours.channels, theirs.channels),
    ):
        fixed = [i for i, name in enumerate(fields) if name not in touched]
        for a, b in zip(left, right, strict=True):
            assert np.array_equal(a.observation[fixed], b.observation[fixed])
    # the decision stays; the action that stands for it follows the budget
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.action[0] == b.action[0]
        inside = abs(a.action[1]) < 1 and abs(b.action[1]) < 1
        even = LAYER_FIELDS.index("even")
        if inside and max(a.observation[even], b.observation[even]) < 1:
            ratio = a.observation[even] / b.observation[even]
            assert b.action[1] - a.action[1] == pytest.approx(np.log2(ratio), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_in_hindsight_the_goal_is_what_was_achieved(budget, numbers):
    goals = []
    genome = roll(budget, numbers, goals)[0].genome
    relabeled = retrace(PROBLEM, genome, budget)
    assert all(t.intrinsic == pytest.approx(0, abs=1e-9) for t in relabeled.channels)
    original = retrace(PROBLEM, genome, budget, goals=goals)
    missed = []
    for layer, goal in zip(PROBLEM.layers, goals, strict=True):
        positions = genome[layer.start : layer.start + layer.n_genes]
        _, mean = share_and_width(layer, positions)
        n_parts = min(PROBLEM.groups, int((layer.widths[positions] > 0).sum()))
        missed += [-GOAL_WEIGHT * abs(mean - goal)] * n_parts
    assert [t.intrinsic for t in original.channels] == pytest.approx(missed)


def test_the_reward_is_the_same_whatever_the_number_of_steps():
    # one number per episode; both controllers get it undiscounted
    points = [(100.0, 1.0), (400.0, 0.01)]
    record = [
        Evaluation(Candidate.of({}), loss, None, {"size_bytes": size}, strategy="rate-distortion")
        for size, loss in points
    ]
    baseline = Baseline(record)
    assert baseline.log_loss(200.0) == pytest.approx(np.log(0.1))
    assert baseline.reward(0.1, 200.0) == pytest.approx(0.0)
    assert baseline.reward(0.1 / np.e, 200.0) == pytest.approx(np.log(2))
    assert baseline.reward(0.1 * np.e, 200.0) == pytest.approx(-np.log(2))
    assert baseline.reward(float("inf"), 200.0) < baseline.reward(100.0, 200.0)
