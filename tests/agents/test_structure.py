"""Limits that only pruning meets: which channels go for them, and that widths are left alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.episode import LAYER_FIELDS, Episodes
from agents.pilot import Ask, Pilot, Scope
from agents.problem import Problem
from agents.wall import Wall
from quant_ops.candidate import Candidate
from search.evaluation import within
from search.testing import AdditiveTask, FakeContext

WIDTHS = (0.0, 2.0, 4.0, 8.0)
TASK = AdditiveTask.make(n_layers=5, n_groups=8, widths=WIDTHS, seed=3)
SPACE = TASK.space
N = len(SPACE.gene_widths)
MACS = sum(layer.macs for layer in SPACE.graph.layers)
LARGEST = TASK.size_bytes(SPACE.largest())


def macs(candidate: Candidate, task: AdditiveTask = TASK) -> float:
    return float(
        sum(
            task.space.graph.layer_of[name].macs * np.mean([b > 0 for b in quant.per_channel(8)])
            for name, quant in candidate.layers
        )
    )


@dataclass(eq=False)
class PrunedContext(FakeContext):
    """Counts multiply-accumulates of the channels that are left."""

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        return {**super().cost_of(candidate), "macs": macs(candidate, self.task)}


def problem_with(**budgets: float) -> tuple[PrunedContext, Problem]:
    context = PrunedContext(TASK, budgets=budgets)
    return context, Problem.of(context, "taylor", 3)


CONTEXT, PROBLEM = problem_with(size_bytes=LARGEST, macs=0.5 * MACS)


def test_channels_go_by_importance_for_what_they_free():
    structure = PROBLEM.structure
    assert structure is not None
    assert structure.costs == ("macs",)
    assert len(structure.sets) == N  # nothing is tied here, and layers may vanish
    for (gene,) in structure.sets:
        layer = PROBLEM.layers[gene // 8]
        worth = layer.scores[gene % 8] * PROBLEM.importance.levels[layer.name]
        freed = SPACE.graph.layer_of[layer.name].macs / 8 / (0.5 * MACS)
        assert structure.frees[gene] == pytest.approx(freed)
        assert structure.level[gene] == pytest.approx(0.5 * np.log2(worth / freed))
    ordered = [structure.level[gene] for (gene,) in structure.sets]
    assert ordered == sorted(ordered)
    trimmed = structure.trimmed(PROBLEM.widest[None])[0]
    gone = [int(genes[0]) for genes in structure.sets if trimmed[genes[0]] == 0]
    first = [int(genes[0]) for genes in structure.sets[: len(gone)]]
    assert gone == first
    assert macs(SPACE.decode(trimmed.tolist())) <= 0.5 * MACS
    trimmed[gone[-1]] = len(WIDTHS) - 1  # one set fewer is not enough
    assert macs(SPACE.decode(trimmed.tolist())) > 0.5 * MACS


def test_an_action_of_0_prunes_what_the_limit_asks_for_and_no_width_is_lost():
    rolled = Pilot(Scope(), "ddpg", 8).roll_out(
        PROBLEM, [Ask(LARGEST, trust=0.0)], np.random.default_rng(0)
    )
    genome = rolled[0].genome
    assert PROBLEM.structure.freed(genome[None])[0] >= 1
    assert PROBLEM.structure.freed(genome[None])[0] < 1.15
    assert set(np.unique(genome)) == {0, len(WIDTHS) - 1}


def test_what_is_missing_is_seen_and_falls():
    episodes = Episodes(PROBLEM, [LARGEST])
    field = LAYER_FIELDS.index("missing")
    missing = []
    while not episodes.done:
        missing.append(float(episodes.layer_observations()[0, field]))
        decisions = episodes.decisions_of(np.zeros(1), np.zeros(1))
        again = episodes.actions_of(decisions)
        assert episodes.decisions_of(again[:, 0], again[:, 1]).n_pruned == decisions.n_pruned
        episodes.begin_layer(decisions)
        episodes.place_evenly()
        episodes.settle()
    assert missing[0] == 1
    assert missing == sorted(missing, reverse=True)


@pytest.mark.parametrize("order", ["bits", "channels", "layers"])
@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    genome=st.lists(st.integers(0, len(WIDTHS) - 1), min_size=N, max_size=N).map(np.array),
    share=st.floats(0.3, 1.0),
    size=st.floats(0.2, 1.0),
)
def test_behind_the_wall_both_limits_hold(order, genome, share, size):
    limits = {"size_bytes": size * LARGEST, "macs": share * MACS}
    context, problem = problem_with(**limits)
    lowered = SPACE.decode(Wall(problem, order).lower(context, genome, limits))
    assert within(limits, context.cost_of(lowered))


def test_the_wall_leaves_widths_alone_where_channels_are_what_is_asked():
    limits = {"size_bytes": LARGEST, "macs": 0.6 * MACS}
    lowered = Wall(PROBLEM).lower(CONTEXT, PROBLEM.widest, limits)
    assert set(lowered) == {0, len(WIDTHS) - 1}


def test_without_such_a_limit_nothing_changes():
    _, problem = problem_with(size_bytes=0.5 * LARGEST)
    assert problem.structure is None
    _, problem = problem_with(size_bytes=0.5 * LARGEST, macs=2 * MACS)
    assert problem.structure is None
    _, problem = problem_with(bops=0.5 * TASK.bops(SPACE.largest()))  # widths can meet it
    assert problem.structure is None


@pytest.mark.parametrize("order", ["bits", "layers"])
def test_with_a_width_per_layer_whole_layers_go(order):
    task = AdditiveTask.make(n_layers=5, widths=(2.0, 4.0, 8.0), removable=(1, 3), seed=3)
    layers = {layer.name: layer.macs for layer in task.space.graph.layers}
    spare = min(layers["layer1"], layers["layer3"])
    limits = {"size_bytes": LARGEST, "macs": sum(layers.values()) - spare}
    context = PrunedContext(task, budgets=limits)
    problem = Problem.of(context, "taylor", 3)
    lowered = task.space.decode(Wall(problem, order).lower(context, problem.widest, limits))
    assert within(limits, context.cost_of(lowered))
    gone = [name for name, quant in lowered.layers if not any(quant.bit_widths)]
    assert len(gone) == 1
    assert {b for _, quant in lowered.layers for b in quant.bit_widths} == {0, 8}


def test_what_no_pruning_can_meet_ends_at_the_smallest_network():
    limits = {"size_bytes": LARGEST, "macs": 0.01 * MACS}
    task = AdditiveTask.make(n_layers=5, n_groups=8, widths=(2.0, 4.0, 8.0), removable=(1,), seed=3)
    context = PrunedContext(task, budgets=limits)
    problem = Problem.of(context, "taylor", 3)
    lowered = Wall(problem).lower(context, problem.widest, limits)
    assert task.space.decode(lowered) == task.space.smallest()
