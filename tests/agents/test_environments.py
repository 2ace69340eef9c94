"""Both environments under both checkers, and under one seed."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as baselines_check

import agents
from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS
from agents.problem import Problem
from search.testing import AdditiveTask, FakeContext

WIDTHS = (0.0, 1.0, 2.0, 4.0, 8.0)
IDS = ["bitfront/LayerController-v0", "bitfront/ChannelController-v0"]


@pytest.fixture(scope="module")
def task():
    return AdditiveTask.make(n_layers=4, n_groups=8, widths=WIDTHS)


def make(name, task):
    problem = Problem.of(FakeContext(task), "taylor", 3)
    assert agents.PROJECT == "bitfront"  # importing the package registers the environments
    return gymnasium.make(name, problem=problem, judge=lambda c, budget: -task.loss(c))


@pytest.mark.parametrize("name", IDS)
def test_environment_passes_both_checkers(name, task):
    gymnasium_check(make(name, task).unwrapped, skip_render_check=True)
    baselines_check(make(name, task).unwrapped)


def episode(environment, seed):
    generator = np.random.default_rng(seed)
    observation, _ = environment.reset(seed=seed)
    rows, rewards, done = [observation], [], False
    while not done:
        action = generator.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
        observation, reward, done, _, info = environment.step(action)
        rows.append(observation)
        rewards.append(reward)
    return np.array(rows), rewards, info["candidate"]


@pytest.mark.parametrize("name", IDS)
def test_one_seed_gives_one_episode(name, task):
    first, second, other = (episode(make(name, task), seed) for seed in (3, 3, 4))
    assert np.array_equal(first[0], second[0])
    assert first[1:] == second[1:]
    assert first[2] != other[2]


@pytest.mark.parametrize("name", IDS)
def test_observations_and_candidates_stay_in_their_spaces(name, task):
    for seed in range(20):
        environment = make(name, task)
        rows, _, candidate = episode(environment, seed)
        assert all(environment.observation_space.contains(row) for row in rows)
        assert task.space.contains(candidate)


def test_the_reward_is_terminal_and_what_the_judge_says(task):
    _, rewards, candidate = episode(make(IDS[0], task), 0)
    assert rewards[:-1] == [0.0] * 3
    assert rewards[-1] == -task.loss(candidate)


def test_the_budget_is_part_of_both_observations(task):
    assert "budget" in LAYER_FIELDS
    assert "budget" in CHANNEL_FIELDS
    environment = make(IDS[0], task)
    at = LAYER_FIELDS.index("budget")
    seen = [environment.reset(options={"budget_bytes": b})[0][at] for b in (400.0, 800.0)]
    problem = environment.unwrapped._problem
    wanted = [8 * (b - problem.size.fixed) / problem.n_weights / 8 for b in (400.0, 800.0)]
    assert seen == pytest.approx(np.clip(wanted, 0, 1), rel=1e-5)


def test_a_channel_episode_is_charged_half_a_bit_per_bit_off_the_goal(task):
    environment = make(IDS[1], task).unwrapped
    environment._judge = lambda candidate, budget: 0.0
    for seed in range(10):
        environment.reset(seed=seed)
        done = False
        while not done:
            goal, layer = environment._episode.goals[0], environment._episode.layer
            genes = np.flatnonzero(environment._episode.part_of[0] >= 0)
            genomes = environment._episode.genomes
            _, reward, done, _, _ = environment.step(np.array([1.0], np.float32))
            if reward:
                widths = layer.widths[genomes[0, layer.start + genes]]
                achieved = widths @ layer.weights[genes] / layer.weights[genes].sum()
                assert reward == pytest.approx(-0.5 * abs(achieved - goal))
