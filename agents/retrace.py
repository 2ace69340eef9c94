"""From a finished genome back to the transitions that would have led there, under any budget.

Relabelling is hindsight replay [Andrychowicz2017]; the goal between the levels is from [Lou2020].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.episode import Episode, LayerDecision, Row, share_and_width
from agents.problem import Ints, Problem

GOAL_WEIGHT = 0.5  # of a missed goal, per bit of the layer's mean width, in units of the reward


@dataclass(frozen=True, slots=True, eq=False)
class Transition:
    """One decision.

    Attributes:
        observation: before it.
        action: executed, in [-1, 1].
        intrinsic: what the decision's layer adds to the episode's reward: 0, or the penalty for
            missing the goal.
    """

    observation: Row
    action: Row
    intrinsic: float = 0.0

    def only(self, columns: Sequence[int]) -> "Transition":
        """With some of the action's numbers."""
        return replace(self, action=self.action[list(columns)])


@dataclass(frozen=True, slots=True)
class Trace:
    """The transitions of one episode."""

    layers: tuple[Transition, ...]
    channels: tuple[Transition, ...]


def retrace(
    problem: Problem,
    genome: Sequence[int],
    budget_bytes: float,
    *,
    goals: Sequence[float] | None = None,
    zeros: NDArray[np.bool_] | None = None,
) -> Trace:
    """Every field that depends on the budget is computed anew for `budget_bytes`.

    Args:
        problem: the constants.
        genome: the executed decisions, after the wall.
        budget_bytes: the budget that the transitions speak of: the one that was given, or, in
            hindsight, the bytes that were used.
        goals: mean widths that the layer controller asked for, one per step; None puts the
            achieved means in their place, which every goal then is met by.
        zeros: see `Episode`.
    """
    episode = Episode(problem, budget_bytes, zeros)
    final = np.asarray(genome, dtype=np.intp)
    layers, channels = [], []
    step = 0
    while not episode.done:
        layer = episode.layer
        positions = final[layer.start : layer.start + layer.n_genes]
        _, mean = share_and_width(layer, positions)
        n_pruned = int(layer.is_zero[positions].sum())
        goal = mean if goals is None or not mean else goals[step]
        observation = episode.layer_observation()
        executed = LayerDecision(n_pruned, mean or float(layer.widths[layer.first_width]))
        action = np.array(episode.action_of(executed), np.float32)
        layers.append(Transition(observation, action))
        if n_pruned < layer.n_genes:
            channels += _channel_transitions(episode, positions, LayerDecision(n_pruned, goal))
        episode.overwrite(positions)
        step += 1
    return Trace(tuple(layers), tuple(channels))


def _channel_transitions(
    episode: Episode, positions: Ints, decision: LayerDecision
) -> list[Transition]:
    layer = episode.layer
    _, mean = share_and_width(layer, positions)
    intrinsic = -GOAL_WEIGHT * abs(mean - decision.goal)
    episode.begin_survivors(decision.goal, np.flatnonzero(~layer.is_zero[positions]))
    out = []
    for part in episode.parts:
        width = episode.followed_width(positions)
        observation = episode.channel_observation()
        action = np.array([episode.channel_action_of(width)], np.float32)
        out.append(Transition(observation, action, intrinsic))
        episode.record_widths(positions[part])
    return out
