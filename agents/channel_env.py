"""The channel controller's task as a gymnasium environment, `bitfront/ChannelController-v0`."""

from typing import Any

import gymnasium
import numpy as np

from agents.controllers import Rows
from agents.episode import CHANNEL_FIELDS, Episode, mean_width
from agents.layer_env import Judge
from agents.problem import Problem
from agents.retrace import GOAL_WEIGHT


class ChannelEnv(gymnasium.Env[Rows, Rows]):
    """One episode is one candidate, one step is one rank group of one layer's survivors.

    Observation: float32 in [0, 1], one entry per name in `agents.episode.CHANNEL_FIELDS`, where
    unit and scaling of each are written.

    Action: float32 (1,) in [-1, 1]: the group's width is the one that the goal still needs, plus
    2 bits times the action, rounded to a legal width that is not below the group's before.

    Reward: at the end of a layer, minus half a bit's distance from the goal per bit; at the last
    layer what `judge` says besides. Sparsities and goals are drawn at random, as a layer
    controller that knows nothing would.

    Args:
        problem: the network, its ranking and its sizes.
        judge: the reward of a finished candidate.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium's own attribute

    def __init__(self, problem: Problem, judge: Judge) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(CHANNEL_FIELDS),), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._problem = problem
        self._judge = judge
        self._episode = Episode(problem, problem.limits[1])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Rows, dict[str, Any]]:
        """A new candidate; `options={"budget_bytes": ...}` sets the budget of this episode."""
        super().reset(seed=seed)
        drawn = float(2 ** self.np_random.uniform(*np.log2(self._problem.limits)))
        budget = float((options or {}).get("budget_bytes", drawn))
        self._episode = Episode(self._problem, budget)
        self._begin()
        return self._observation(), {"budget_bytes": budget}

    def step(self, action: Rows) -> tuple[Rows, float, bool, bool, dict[str, Any]]:
        """Give one rank group a width."""
        episode = self._episode
        layer, genes = episode.layer, np.concatenate(episode.parts)
        goal, at = episode.goal, episode.at
        reward = 0.0
        if episode.place(episode.width_of(float(action[0]))):
            achieved = mean_width(layer, genes, episode.genome[layer.start + genes])
            reward = -GOAL_WEIGHT * abs(achieved - goal)
            self._begin(at)
        if not episode.done:
            return self._observation(), reward, False, False, {}
        candidate = self._problem.space.decode(episode.genome.tolist())
        reward += float(self._judge(candidate, episode.budget_bytes))
        return self._observation(), reward, True, False, {"candidate": candidate}

    def _begin(self, at: int | None = None) -> None:
        """Decide layers at random until one has survivors, or none is left."""
        episode = self._episode
        while not episode.done and (at is None or episode.at != at):
            at = episode.at
            sparsity, width = self.np_random.uniform(-1.0, 1.0, 2)
            episode.begin_layer(episode.decision_of(float(sparsity), float(width)))

    def _observation(self) -> Rows:
        if self._episode.done:
            return np.zeros(len(CHANNEL_FIELDS), np.float32)
        return self._episode.channel_observation()
