"""The layer controller's task as a gymnasium environment, `bitfront/LayerController-v0`."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from agents.episode import LAYER_FIELDS, Episodes, Rows
from agents.problem import Problem
from quant_ops.candidate import Candidate

Judge = Callable[[Candidate, float], float]
"""(finished candidate, budget in bytes) -> reward, the budget wall included."""


class LayerEnv(gymnasium.Env[Rows, Rows]):
    """One episode is one candidate, one step is one layer that has a choice.

    Observation: float32 in [0, 1], one entry per name in `agents.episode.LAYER_FIELDS`, where
    unit and scaling of each are written; the budget is among them. Nothing depends on how many
    layers or channels the network has, so that a policy can be used on another one.

    Action: float32 (2,) in [-1, 1]: sparsity, with which genes go whose share of the bits is
    below 1/2 + 1.5 a; and width, with a mean of 2^a times the survivors' share.

    Reward: 0, and at the last layer what `judge` says. The survivors of a layer get widths as
    near as possible to the mean that was asked for.

    Args:
        problem: the network, its ranking and its sizes.
        judge: the reward of a finished candidate.
        budget_bytes: of every episode; None draws one at every reset, evenly in its logarithm.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium's own attribute

    def __init__(self, problem: Problem, judge: Judge, budget_bytes: float | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(LAYER_FIELDS),), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._problem = problem
        self._judge = judge
        self._budget_bytes = budget_bytes
        self._episode = Episodes(problem, [problem.limits[1]])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Rows, dict[str, Any]]:
        """A new candidate; `options={"budget_bytes": ...}` sets the budget of this episode."""
        super().reset(seed=seed)
        budget = (options or {}).get("budget_bytes", self._budget_bytes)
        if budget is None:
            budget = float(2 ** self.np_random.uniform(*np.log2(self._problem.limits)))
        self._episode = Episodes(self._problem, [float(budget)])
        return self._episode.layer_observations()[0], {"budget_bytes": float(budget)}

    def step(self, action: Rows) -> tuple[Rows, float, bool, bool, dict[str, Any]]:
        """Decide one layer."""
        episode = self._episode
        sparsity, width = np.asarray(action, float)[:, None]
        episode.begin_layer(episode.decisions_of(sparsity, width))
        while episode.open.any():
            episode.place(episode.positions_of(np.zeros(1)))
        episode.settle()
        if not episode.done:
            return episode.layer_observations()[0], 0.0, False, False, {}
        candidate = self._problem.space.decode(episode.genomes[0].tolist())
        reward = float(self._judge(candidate, float(episode.budgets[0])))
        last = np.zeros(len(LAYER_FIELDS), np.float32)
        return last, reward, True, False, {"candidate": candidate}
