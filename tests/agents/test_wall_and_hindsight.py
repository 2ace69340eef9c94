"""Every episode ends legal, and what is remembered of it is exact under any budget."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS, Episodes, shares_and_widths
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


def test_the_wall_takes_the_bits_that_importance_values_least():
    wall = Wall(PROBLEM)
    lowered = np.array(wall.lower(CONTEXT, PROBLEM.widest, {"size_bytes": 0.6 * LARGEST}))
    excess = []  # bits that the next wider width of each gene would lie above its prior
    kept = []
    for layer in PROBLEM.layers:
        positions = lowered[layer.start : layer.start + layer.n_genes]
        narrowed = positions < len(WIDTHS) - 1
        next_width = layer.widths[np.minimum(positions + 1, len(WIDTHS) - 1)]
        excess.append((next_width - layer.prior)[narrowed])
        kept.append((layer.widths[positions] - layer.prior)[positions > 1])
    # no bit that was taken was worth more than one that was kept
    assert np.concatenate(excess).min() >= np.concatenate(kept).max() - 1e-9


@settings(max_examples=20, deadline=None)
@given(genome=genomes, budget=budgets)
def test_what_a_genome_leaves_over_is_spent_on_its_survivors(genome, budget):
    filled = Wall(PROBLEM).filled(genome[None], np.array([budget]))[0]
    before, after = PROBLEM.size.estimate(np.stack([genome, filled]))
    if before <= budget:
        assert (filled >= genome).all()
        assert (filled[genome == 0] == 0).all()
        survivors = np.where(genome > 0, PROBLEM.widest, genome)
        most = PROBLEM.size.estimate(survivors[None])[0]
        assert after <= max(budget, before)
        step = 1.4 * max(layer.weights.max() for layer in PROBLEM.layers) / 8
        assert after >= min(budget, most) - 9 * step
    else:
        assert (filled <= genome).all()


def test_importance_shares_out_what_the_budget_allows():
    shares = PROBLEM.shares(0, np.array([2.5]))[0]
    level = np.median(shares - PROBLEM.layers[0].prior)  # of genes that are not at an end
    bits = 0.0
    for layer in PROBLEM.layers:
        mine = layer.clipped(level + layer.prior)
        assert (np.diff(mine[layer.order]) >= 0).all()
        bits += mine @ layer.weights
    assert bits / PROBLEM.n_weights == pytest.approx(2.5, abs=0.05)


def test_estimates_of_several_genomes_are_those_of_each():
    rng = np.random.default_rng(0)
    several = rng.integers(0, len(WIDTHS), (7, N)) * rng.integers(0, 2, (7, N))
    together = PROBLEM.size.estimate(several)
    assert together == pytest.approx([PROBLEM.size.estimate(g[None])[0] for g in several])


def test_an_estimate_that_is_wrong_does_not_matter():
    off = Problem.of(CONTEXT, "taylor", 3)
    off.size.fixed += 1000.0
    lowered = Wall(off).lower(CONTEXT, off.widest, {"size_bytes": LARGEST / 2})
    assert TASK.size_bytes(TASK.space.decode(lowered)) <= LARGEST / 2


def roll(budget, numbers, goals=None):
    """(episodes, layer rows, channel rows) of one episode under given actions."""
    episodes, numbers = Episodes(PROBLEM, [budget]), iter(numbers)
    layers, channels = [], []

    def following():
        return np.array([next(numbers)])

    while not episodes.done:
        layers.append(episodes.layer_observations()[0])
        decisions = episodes.decisions_of(following(), following())
        if goals is not None:
            goals.append(decisions.goals[0])
        episodes.begin_layer(decisions)
        while episodes.open.any():
            channels.append(episodes.channel_observations()[0])
            episodes.place(episodes.positions_of(following()))
        episodes.settle()
    return episodes, layers, channels


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_retracing_an_episode_sees_what_the_episode_saw(budget, numbers):
    goals = []
    episodes, layers, channels = roll(budget, numbers, goals)
    trace = retrace(PROBLEM, episodes.genomes, [budget], goals=np.array([goals]))
    assert np.array_equal(trace.layers.observations, layers)
    if channels:
        assert np.allclose(trace.channels.observations, channels, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(first=budgets, second=budgets, numbers=actions, others=actions)
def test_episodes_side_by_side_are_those_of_each(first, second, numbers, others):
    genomes = [roll(first, numbers)[0].genomes[0], roll(second, others)[0].genomes[0]]
    both = retrace(PROBLEM, np.array(genomes), [first, second])
    for number, budget in enumerate((first, second)):
        one = retrace(PROBLEM, genomes[number][None], [budget])
        for name in ("layers", "channels"):
            mine, together = getattr(one, name), getattr(both, name)
            rows = together.episodes == number
            assert np.allclose(mine.observations, together.observations[rows], atol=1e-6)
            assert np.allclose(mine.actions, together.actions[rows], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_widths_do_not_fall_with_importance(budget, numbers):
    genome = roll(budget, numbers)[0].genomes[0]
    for layer, choice in zip(PROBLEM.layers, LAYERS, strict=True):
        positions = genome[layer.start : layer.start + layer.n_genes][layer.order]
        assert (np.diff(positions) >= 0).all()
        assert positions.any() or choice.may_vanish


@settings(max_examples=60, deadline=None)
@given(budget=budgets, other=budgets, numbers=actions)
def test_hindsight_recomputes_what_depends_on_the_budget_and_nothing_else(budget, other, numbers):
    genomes = roll(budget, numbers)[0].genomes
    ours, theirs = retrace(PROBLEM, genomes, [budget]), retrace(PROBLEM, genomes, [other])
    touched = {"budget", "even", "share", "spent"}
    for fields, left, right in (
        (LAYER_FIELDS, ours.layers, theirs.layers),
        (CHANNEL_FIELDS, ours.channels, theirs.channels),
    ):
        if not len(left.actions):
            continue
        fixed = [i for i, name in enumerate(fields) if name not in touched]
        assert np.array_equal(left.observations[:, fixed], right.observations[:, fixed])
    # the decision stays; the action that stands for it follows the budget
    assert np.array_equal(ours.channels.actions, theirs.channels.actions)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_an_action_of_a_decision_makes_that_decision(budget, numbers):
    numbers = iter(numbers)
    episodes = Episodes(PROBLEM, [budget])
    while not episodes.done:
        wanted = episodes.decisions_of(*(np.array([next(numbers)]) for _ in range(2)))
        actions = episodes.actions_of(wanted)
        found = episodes.decisions_of(actions[:, 0], actions[:, 1])
        assert found.n_pruned == wanted.n_pruned
        assert found.goals == pytest.approx(wanted.goals, rel=1e-5)
        episodes.begin_layer(wanted)
        episodes.place_evenly()
        episodes.settle()


def test_0_everywhere_prunes_and_widens_as_importance_says():
    for budget in (0.3 * LARGEST, 0.6 * LARGEST):
        episodes = Episodes(PROBLEM, [budget])
        while not episodes.done:
            shares = PROBLEM.shares(episodes.at, episodes.even_bits)[0]
            decisions = episodes.decisions_of(np.zeros(1), np.zeros(1))
            assert decisions.n_pruned[0] <= (shares < 0.5).sum()
            episodes.begin_layer(decisions)
            while episodes.open.any():
                episodes.place(episodes.positions_of(np.zeros(1)))
            episodes.settle()
        assert PROBLEM.size.estimate(episodes.genomes)[0] == pytest.approx(budget, rel=0.12)


@settings(max_examples=60, deadline=None)
@given(budget=budgets, numbers=actions)
def test_in_hindsight_the_goal_is_what_was_achieved(budget, numbers):
    goals = []
    genomes = roll(budget, numbers, goals)[0].genomes
    relabeled = retrace(PROBLEM, genomes, [budget])
    assert np.abs(relabeled.channels.intrinsic).max(initial=0) == pytest.approx(0, abs=1e-9)
    original = retrace(PROBLEM, genomes, [budget], goals=np.array([goals]))
    missed = []
    for layer, goal in zip(PROBLEM.layers, goals, strict=True):
        positions = genomes[:, layer.start : layer.start + layer.n_genes]
        mean = shares_and_widths(layer, positions)[1][0]
        n_parts = min(PROBLEM.groups, int((layer.widths[positions] > 0).sum()))
        missed += [-GOAL_WEIGHT * abs(mean - goal)] * n_parts
    assert original.channels.intrinsic == pytest.approx(missed)


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
