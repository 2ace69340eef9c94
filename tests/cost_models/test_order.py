"""Orders of operations against every order of small problems."""

import itertools

import numpy as np
import pytest

from cost_models import order
from cost_models.order import Operation, Problem


def random_problem(rng: np.random.Generator, n: int) -> Problem:
    """Operations that each write a piece and read up to two earlier ones."""
    operations = []
    for at in range(n):
        read = tuple(int(r) for r in dict.fromkeys(rng.integers(0, at + 1, rng.integers(1, 3))))
        operations.append(
            Operation(
                after=frozenset(r - 1 for r in read if r),
                uses=(at + 1, *read),
                scratch=int(rng.choice([0, 0, 5])),
                overwrites=read if rng.random() < 0.4 else (),
            )
        )
    n_bytes = tuple(int(b) for b in rng.integers(1, 40, n + 1))
    kept = frozenset({n, int(rng.integers(1, n + 1))})
    return Problem(tuple(operations), n_bytes, frozenset({0}), kept)


def peak(problem: Problem, sequence: tuple[int, ...]) -> int:
    """What is alive, step by step, from first and last uses."""
    step = {operation: at for at, operation in enumerate(sequence)}
    lives = {}
    for piece, size in enumerate(problem.n_bytes):
        users = [step[o] for o, own in enumerate(problem.operations) if piece in own.uses]
        if not users and piece not in problem.ready | problem.kept:
            continue
        first = 0 if piece in problem.ready else min(users)
        last = len(sequence) - 1 if piece in problem.kept or not users else max(users)
        lives[piece] = first, last, size
    worst = 0
    for at, operation in enumerate(sequence):
        own = problem.operations[operation]
        alive = sum(size for first, last, size in lives.values() if first <= at <= last)
        for piece in own.uses:
            born = piece not in problem.ready and lives[piece][0] == at
            free = [
                old
                for old in own.overwrites
                if old not in problem.ready | problem.kept and lives[old][1] == at
            ]
            if born and any(problem.n_bytes[o] >= problem.n_bytes[piece] for o in free):
                alive -= problem.n_bytes[piece]
        worst = max(worst, alive + own.scratch)
    return worst


def sequences(problem: Problem) -> list[tuple[int, ...]]:
    n = len(problem.operations)
    return [
        sequence
        for sequence in itertools.permutations(range(n))
        if all(problem.operations[o].after <= set(sequence[:at]) for at, o in enumerate(sequence))
    ]


@pytest.mark.parametrize("seed", range(200))
def test_the_least_peak_of_all_orders_is_found(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(2, 7)))
    found = problem.least_live()
    assert found.is_optimal
    every = sequences(problem)
    assert found.order in every
    assert found.live_bytes == min(peak(problem, sequence) for sequence in every)
    assert found.live_bytes == peak(problem, found.order)
    assert problem.live_bytes(every[0]) == peak(problem, every[0])


def test_a_search_that_is_cut_short_is_never_worse_than_the_given_order(monkeypatch):
    monkeypatch.setattr(order, "_MAX_STATES", 3)
    better = 0
    for seed in range(30):
        problem = random_problem(np.random.default_rng(seed), 40)
        given = problem.live_bytes(range(40))
        found = problem.least_live()
        assert problem.live_bytes(found.order) == found.live_bytes <= given
        better += found.live_bytes < given
    assert better > 5
