"""One learned policy on stable-baselines3: act, remember, learn. The episode loop is ours."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from agents.layer_facts import Floats
from agents.retrace import Transitions

ALGORITHMS: Mapping[str, type[OffPolicyAlgorithm]] = {"ddpg": DDPG, "td3": TD3, "sac": SAC}
BUFFER = 40_000  # transitions; with rows of twenty numbers a few megabytes
BATCH = 256  # a step on 256 costs a quarter more than one on 64
TIMID = 0.05  # of the library's first weights of the last layer: answers begin near 0
LEARNING_RATE = 1e-3

Rows = NDArray[np.float32]


@contextmanager
def seeded(*parts: int | str) -> Iterator[np.random.Generator]:
    """Everything random inside depends on `parts` alone; what was outside goes on as before.

    stable-baselines3 draws from the global generators of torch, numpy and Python.
    """
    numbers = [crc32(p.encode()) if isinstance(p, str) else p for p in parts]
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    before = np.random.get_state(), random.getstate()  # noqa: NPY002, the library's generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield np.random.default_rng(seed)
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])


class Spaces(gymnasium.Env[Rows, Rows]):
    """An environment that only says what its spaces are: a policy is built from it."""

    def __init__(self, n_observations: int, n_actions: int) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (n_observations,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (n_actions,), np.float32)


class Controller:
    """Actor, critics and a replay buffer: DDPG [Lillicrap2016] or one of its successors.

    A decision's return is known when its episode ends, and it is what the critic learns: with
    one reward at the end and no discount, every state's return is that reward, however many
    steps are left. Transitions are therefore stored as complete, with the return as reward;
    nothing is bootstrapped over twenty steps.

    Args:
        algorithm: ddpg, td3 or sac.
        n_observations: length of an observation.
        n_actions: length of an action, each in [-1, 1].
        hidden: units of each of the two hidden layers.
    """

    def __init__(self, algorithm: str, n_observations: int, n_actions: int, hidden: int) -> None:
        self.algorithm = algorithm
        self.hidden = hidden
        self.n_observations, self.n_actions = n_observations, n_actions
        self.model = ALGORITHMS[algorithm](
            "MlpPolicy",
            Spaces(n_observations, n_actions),
            learning_rate=LEARNING_RATE,
            buffer_size=BUFFER,
            gamma=1.0,
            policy_kwargs={"net_arch": [hidden, hidden]},
            device="cpu",
        )
        self.model.set_logger(Logger(folder=None, output_formats=[]))
        self._begin_near_zero()

    def _begin_near_zero(self) -> None:
        """Of actor and target alike; 0 is the decision that importance makes."""
        policy: Any = self.model.policy
        actor = policy.actor
        last = [m for m in actor.mu.modules() if isinstance(m, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(TIMID)
            last.bias.mul_(TIMID)
        target = getattr(policy, "actor_target", None)
        if target is not None:
            target.load_state_dict(actor.state_dict())

    def act(self, observations: Rows) -> Rows:
        """(n, n_observations) to (n, n_actions): the policy's own answer, without noise."""
        actions, _ = self.model.predict(observations, deterministic=True)
        return np.asarray(actions, dtype=np.float32)

    def remember(self, transitions: Transitions, rewards: Floats) -> None:
        """Put transitions into the replay buffer, with (episodes,) rewards."""
        buffer = self.model.replay_buffer
        assert buffer is not None
        done = np.array([True])
        infos: list[dict[str, Any]] = [{}]
        totals = rewards[transitions.episodes] + transitions.intrinsic
        for number in range(len(totals)):
            row, action = transitions.observations[[number]], transitions.actions[[number]]
            buffer.add(row, row, action, totals[[number]], done, infos)

    def learn(self, steps: int) -> None:
        """Gradient steps on what is remembered, once that is at least one batch."""
        buffer = self.model.replay_buffer
        assert buffer is not None
        if steps and buffer.size() >= BATCH:
            self.model.train(gradient_steps=steps, batch_size=BATCH)

    def tensors(self) -> dict[str, Tensor]:
        """Name to parameter of actor and critics."""
        return {n: t.detach().contiguous() for n, t in self.model.policy.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self.model.policy.load_state_dict(dict(tensors))
