"""The agent on a task whose optimum is a formula."""

import random

import numpy as np
import pytest
import torch

from agents.controllers import Controller, seeded
from agents.ensemble import Ensemble, Law
from agents.problem import Problem
from agents.retrace import Transitions
from search.allocation import allocate, total
from search.strategies.table import make_strategy
from search.testing import AdditiveTask, FakeContext, run_to_end

WIDTHS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
FAST = {"steps": 8, "hidden": 32}


def make(seed):
    return AdditiveTask.make(n_layers=6, n_groups=1, widths=WIDTHS, seed=seed)


def optimum(task, budget):
    """The task is additive, so the integer program is exact."""
    names = [choice.name for choice in task.space.layers]
    widths = np.array(WIDTHS)
    losses = [task.sensitivity[name] * 4.0**-widths for name in names]
    sizes = [np.ceil(task.space.graph.layer_of[name].n_weights * widths / 8) for name in names]
    choice = allocate(losses, {"size": sizes}, {"size": budget - 100})
    return total(losses, choice)


def best_of(name, seed, trials=60):
    task = make(seed)
    budget = task.size_bytes(task.space.uniform(3))
    context = FakeContext(
        task, {"size_bytes": budget}, sizes=(budget,), seed=seed, trials=trials, batch_size=6
    )
    settings = {} if name == "random" else FAST
    record = run_to_end(make_strategy(name, settings), context)
    inside = [e.loss for e in record if e.size_bytes <= budget]
    return min(inside), optimum(task, budget)


def test_the_agent_beats_random_and_comes_near_the_optimum():
    gaps = {name: [] for name in ("ajpq", "random")}
    for name, found in gaps.items():
        for seed in range(3):
            best, exact = best_of(name, seed)
            found.append(np.log(best / exact))
    assert np.mean(gaps["ajpq"]) < 0.5 * np.mean(gaps["random"])
    assert np.mean(gaps["ajpq"]) < np.log(1.5)


@pytest.mark.parametrize("algorithm", ["ddpg", "td3", "sac"])
def test_a_controller_learns_the_action_that_pays(algorithm):
    # reward falls with the distance from an action that the observation says
    with seeded(0, algorithm) as generator:
        controller = Controller(algorithm, 1, 1, 32)
        rows = generator.random((600, 1), np.float32)
        actions = generator.uniform(-1, 1, (600, 1)).astype(np.float32)
        rewards = -np.square(actions - (rows - 0.5))[:, 0].astype(float)
        decisions = Transitions(rows, actions, np.arange(600), np.zeros(600))
        controller.remember(decisions, rewards)
        controller.learn(600)
        rows = np.linspace(0.1, 0.9, 9, dtype=np.float32)[:, None]
        error = np.abs(controller.act(rows) - (rows - 0.5)).mean()
    assert error < 0.2


def test_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    wanted = (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    with seeded(5, "anything"):
        first = (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002
    assert (torch.rand(1), np.random.rand(), random.random()) == wanted  # noqa: NPY002
    with seeded(5, "anything"):
        assert (torch.rand(1), np.random.rand(), random.random()) == first  # noqa: NPY002


def test_the_ensemble_learns_an_additive_loss_from_a_few_evaluations():
    task = AdditiveTask.make(n_layers=5, n_groups=4, widths=WIDTHS, seed=3)
    context = FakeContext(task)
    problem = Problem.of(context, "taylor", 4)
    ensemble = Ensemble(problem, Law.of_importance(problem), members=4)
    rng = np.random.default_rng(0)

    def sample(n):
        # one width per layer: what channels weigh within a layer is no part of the formula
        genomes = np.repeat(rng.integers(1, len(WIDTHS), (n, 5)), 4, axis=1)
        candidates = [task.space.decode(g.tolist()) for g in genomes]
        losses = np.array([task.loss(c) for c in candidates])
        return genomes, losses, np.array([float(task.size_bytes(c)) for c in candidates])

    ensemble.fit(*sample(60), rng)
    genomes, losses, sizes = sample(40)
    predicted = np.mean(
        [
            [
                ensemble.log_losses(g[None], m, size)[0]
                for g, size in zip(genomes, sizes, strict=True)
            ]
            for m in range(4)
        ],
        axis=0,
    )
    assert np.abs(predicted - np.log(losses)).mean() < 0.2


def test_too_few_evaluations_leave_the_ensemble_unfitted():
    task = make(0)
    problem = Problem.of(FakeContext(task), "taylor", 4)
    ensemble = Ensemble(problem, Law.of_importance(problem), members=2)
    rows = np.zeros((3, len(task.space.gene_widths)), np.intp)
    ensemble.fit(rows, np.ones(3), np.ones(3), np.random.default_rng(0))
    assert not ensemble.is_fitted
