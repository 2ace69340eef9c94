"""From finished genomes back to the transitions that would have led there, under any budget.

Relabelling is hindsight replay [Andrychowicz2017]; the goal between the levels is from [Lou2020].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.episode import Episodes, LayerDecisions, Mask, Rows, shares_and_widths
from agents.layer_facts import Floats, Ints
from agents.problem import Problem

GOAL_WEIGHT = 0.5  # of a missed goal, per bit of the layer's mean width, in units of the reward


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """Decisions of one controller, in the order of layers and rank groups.

    Attributes:
        observations: (m, fields) before each.
        actions: (m, numbers) executed, in [-1, 1].
        episodes: (m,) number of the episode of each.
        intrinsic: (m,) what the decision's layer adds to the episode's reward: 0, or the penalty
            for missing the goal.
    """

    observations: Rows
    actions: Rows
    episodes: Ints
    intrinsic: Floats


@dataclass(frozen=True, slots=True)
class Trace:
    """The transitions of some episodes."""

    layers: Transitions
    channels: Transitions


def retrace(
    problem: Problem,
    genomes: NDArray[np.intp],
    budgets: Sequence[float],
    *,
    goals: Floats | None = None,
    zeros: Sequence[Mask | None] = (),
    thresholds: bool = True,
) -> Trace:
    """Every field that depends on the budget is computed anew for `budgets`.

    Args:
        problem: the constants.
        genomes: (n, genes) the executed decisions, after the wall.
        budgets: (n,) the budgets that the transitions speak of: those that were given, or, in
            hindsight, the bytes that were used.
        goals: (n, steps) mean widths that the layer controller asked for; NaN, or None for all,
            puts the achieved means in their place, which every goal then is met by.
        zeros: see `Episodes`.
        thresholds: see `Episodes.actions_of`.
    """
    episodes = Episodes(problem, budgets, zeros)
    layers: list[Transitions] = []
    channels: list[Transitions] = []
    everyone = np.arange(episodes.n)
    while not episodes.done:
        layer = episodes.layer
        positions = genomes[:, layer.start : layer.start + layer.n_genes]
        _, means = shares_and_widths(layer, positions)
        n_pruned = layer.is_zero[positions].sum(axis=1)
        executed = LayerDecisions(n_pruned, np.where(means > 0, means, layer.lowest_width))
        observations = episodes.layer_observations()
        actions = episodes.actions_of(executed, thresholds=thresholds)
        layers.append(Transitions(observations, actions, everyone, np.zeros(episodes.n)))
        wanted = means
        if goals is not None:
            asked = goals[:, len(layers) - 1]
            wanted = np.where(np.isnan(asked) | (means == 0), means, asked)
        channels += _channel_transitions(episodes, positions, means, wanted)
        episodes.settle(positions)
    return Trace(_joined(layers), _joined(channels))


def _channel_transitions(
    episodes: Episodes, positions: Ints, means: Floats, goals: Floats
) -> list[Transitions]:
    intrinsic = -GOAL_WEIGHT * np.abs(means - goals)
    episodes.begin_survivors(goals, ~episodes.layer.is_zero[positions])
    out = []
    while episodes.open.any():
        rows = np.flatnonzero(episodes.open)
        observations = episodes.channel_observations()
        executed = episodes.channel_actions_of(episodes.followed_widths(positions))
        actions = executed.astype(np.float32)[:, None]
        out.append(Transitions(observations[rows], actions[rows], rows, intrinsic[rows]))
        episodes.record(positions)
    return out


def _joined(parts: list[Transitions]) -> Transitions:
    if not parts:
        nothing = np.zeros((0, 2), np.float32)
        return Transitions(nothing, nothing, np.zeros(0, np.intp), np.zeros(0))
    return Transitions(
        np.concatenate([p.observations for p in parts]),
        np.concatenate([p.actions for p in parts]),
        np.concatenate([p.episodes for p in parts]),
        np.concatenate([p.intrinsic for p in parts]),
    )
