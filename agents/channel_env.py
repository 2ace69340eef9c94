"""The channel controller's task as a gymnasium environment, `bitfront/ChannelController-v0`."""

from typing import Any

import gymnasium
import numpy as np

from agents.episode import CHANNEL_FIELDS, Episodes, Rows, mean_widths
from agents.layer_env import Judge
from agents.problem import Problem
from agents.retrace import GOAL_WEIGHT


class ChannelEnv(gymnasium.Env[Rows, Rows]):
    """One episode is one candidate, one step is one rank group of one layer's survivors.

    Observation: float32 in [0, 1], one entry per name in `agents.episode.CHANNEL_FIELDS`, where
    unit and scaling of each are written.

    Action: float32 (1,) in [-1, 1]: the group's width is the one that the goal still needs, plus
    a bit times the action, rounded to a legal width that is not below the group's before.

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
        self._episode = Episodes(problem, [problem.limits[1]])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Rows, dict[str, Any]]:
        """A new candidate; `options={"budget_bytes": ...}` sets the budget of this episode."""
        super().reset(seed=seed)
        drawn = float(2 ** self.np_random.uniform(*np.log2(self._problem.limits)))
        budget = float((options or {}).get("budget_bytes", drawn))
        self._episode = Episodes(self._problem, [budget])
        self._begin()
        return self._observation(), {"budget_bytes": budget}

    def step(self, action: Rows) -> tuple[Rows, float, bool, bool, dict[str, Any]]:
        """Give one rank group a width."""
        episode, reward = self._episode, 0.0
        episode.place(episode.positions_of(np.asarray(action, float)))
        if not episode.open.any():
            layer = episode.layer
            positions = episode.genomes[:, layer.start : layer.start + layer.n_genes]
            achieved = mean_widths(layer, positions, episode.part_of >= 0)
            reward = -GOAL_WEIGHT * abs(float((achieved - episode.goals)[0]))
            episode.settle()
            self._begin()
        if not episode.done:
            return self._observation(), reward, False, False, {}
        candidate = self._problem.space.decode(episode.genomes[0].tolist())
        reward += float(self._judge(candidate, float(episode.budgets[0])))
        return self._observation(), reward, True, False, {"candidate": candidate}

    def _begin(self) -> None:
        """Decide layers at random until one has survivors, or none is left."""
        episode = self._episode
        while not episode.done:
            sparsity, width = self.np_random.uniform(-1.0, 1.0, (2, 1))
            episode.begin_layer(episode.decisions_of(sparsity, width))
            if episode.open.any():
                return
            episode.settle()

    def _observation(self) -> Rows:
        if self._episode.done:
            return np.zeros(len(CHANNEL_FIELDS), np.float32)
        return np.asarray(self._episode.channel_observations()[0])
