"""Strategies that learn widths: budgets, harvested points, files, resume, inheritance."""

import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant_ops.candidate import LayerQuant
from quant_ops.errors import BudgetError, UsageError
from quant_ops.learned_widths.limpq import LIMPQ
from quant_ops.packed import PackedModel
from search.config import RunConfig
from search.engine import run_search
from search.finish import packed_path
from search.prepare import prepare
from search.record import Record
from search.strategies.limpq import JointLearning
from search.strategies.table import STRATEGIES, strategy_class
from search.strategies.width_learning import WidthLearning
from search.tasks.table import load_task
from search.training.log import LOGS, read_log
from search.training.settings import TrainingSettings
from search.training.trainer import Trainer

ROWS = [name for name in STRATEGIES if strategy_class(name).traits.needs_training]
FAST = "diffq"


@pytest.fixture(scope="module")
def spec():
    return f"{Path(__file__).parents[1] / 'data' / 'tiny_tasks.py'}:cnn_training"


@pytest.fixture(scope="module")
def task(spec):
    return load_task(spec)


def run(
    spec, task, folder, name=FAST, *, budgets=("2kB",), steps=20, resume=False, first=(), **settings
):
    given = {"steps": steps, "harvest": 2, **settings}
    config = RunConfig(
        task=spec,
        budgets=budgets,
        strategies=(*first, name),
        settings={f"{name}.{key}": str(value) for key, value in given.items()},
        search_samples=128,
    )
    run_search(task, config, folder, resume=resume)
    return Record.open(folder).evaluations()


def meets(folder, evaluation, budget_bytes):
    packed = PackedModel.load(packed_path(folder, evaluation.trial))
    assert packed.digest == evaluation.weights_digest
    assert packed.size_bytes == evaluation.size_bytes
    return 0.98 * budget_bytes <= packed.size_bytes <= budget_bytes


def final(evaluations, name=FAST):
    return [e for e in evaluations if e.recipe == name]


@pytest.mark.parametrize(
    "name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in ROWS]
)
def test_every_method_ends_at_the_budget_with_points_on_the_way(spec, task, tmp_path, name):
    evaluations = run(spec, task, tmp_path, name)
    (found,) = final(evaluations, name)
    assert meets(tmp_path, found, 2000)
    harvested = [e for e in evaluations if e.recipe == f"{name} harvest"]
    assert len(harvested) == 2
    assert all(e.size_bytes >= found.size_bytes * 0.98 for e in harvested)
    assert all(e.is_trained and packed_path(tmp_path, e.trial).exists() for e in evaluations)
    assert Record.open(tmp_path).facts("training")[found.trial]["steps"] == 20


def test_both_parts_train_at_the_rate_of_a_training_of_both(spec, task, tmp_path):
    run(spec, task, tmp_path)
    peak = TrainingSettings(steps=20).peak_rate
    part = TrainingSettings(steps=10, rate=peak)
    logs = sorted((tmp_path / LOGS).glob("*ing.jsonl"))
    assert len(logs) == 2
    for path in logs:
        for row in read_log(path):
            assert row["rate"] == pytest.approx(part.rate_at(row["step"] - 1))


@pytest.mark.parametrize(("name", "group"), [(FAST, 8), ("self-compressing", 1)])
def test_channels_share_widths_as_the_method_usually_has_it(
    spec, task, tmp_path, monkeypatch, name, group
):
    trainer, seen = WidthLearning.trainer, []

    def kept(learning, *args, **settings):
        made = trainer(learning, *args, **settings)
        seen.extend(module.group_of.bincount().max().item() for module in learning.modules.values())
        return made

    monkeypatch.setattr(WidthLearning, "trainer", kept)
    run(spec, task, tmp_path, name, steps=2, harvest=0)
    assert max(seen) == group


def test_limpq_gives_layers_whose_steps_are_alike_the_same_widths(
    spec, task, tmp_path, monkeypatch
):
    chosen, seen = JointLearning.chosen, []

    def kept(learning, budget_bytes):
        seen.append(chosen(learning, budget_bytes))
        return seen[-1]

    def alike(module):
        return torch.exp2(-module.choice_values).expand(module.n_groups, -1)

    monkeypatch.setattr(JointLearning, "chosen", kept)
    monkeypatch.setattr(LIMPQ, "group_importance", alike)
    run(spec, task, tmp_path, "limpq", steps=2, harvest=0)
    widths = {width for _, quant in seen[-1].layers for width in quant.bit_widths}
    assert max(widths) - min(widths) <= 1


def next_step(task, config, candidate):
    """Bytes of the smallest file that is one width of one unit wider, and of the candidate."""
    prepared = prepare(task, config)
    graph, space, cost = prepared.traced.graph, prepared.space, prepared.costs["size_bytes"].cost
    sizes = []
    for choice in space.layers:
        quant = candidate.assignment[choice.name]
        widths = quant.per_channel(graph.layer_of[choice.name].out_channels)
        units = [[c] for c in range(len(widths))]
        for unit in units if space.finest == "channel" else [range(len(widths))]:
            here = widths[unit[0]]
            wider = [w for w in choice.bit_widths if w > here > 0]
            if wider:
                moved = tuple(min(wider) if c in unit else w for c, w in enumerate(widths))
                changed = LayerQuant(moved, quant.scheme, quant.group_size)
                sizes.append(int(cost(graph, candidate.replace({choice.name: changed}))))
    return min(sizes, default=sys.maxsize), int(cost(graph, candidate))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("cnn_training", "packed"),
        pytest.param("mlp_training", "packed", marks=pytest.mark.slow),
        pytest.param("mlp_training", "int4-int8", marks=pytest.mark.slow),
        pytest.param("zoo_training", "packed", marks=pytest.mark.slow),
    ],
)
def test_five_sizes_are_met_to_two_percent_or_a_step(spec, tmp_path, name, target):
    task = load_task(f"{spec.rpartition(':')[0]}:{name}")
    config = RunConfig(
        task=task.name,
        strategies=(FAST,),
        target=target,
        settings={f"{FAST}.steps": "4", f"{FAST}.harvest": "0"},
        search_samples=128,
    )
    prepared = prepare(task, config)
    graph, cost = prepared.traced.graph, prepared.costs["size_bytes"].cost
    narrow, wide = (int(cost(graph, prepared.space.uniform(width))) for width in (1, 8))
    budgets = [round(narrow * (wide / narrow) ** (0.1 + 0.2 * k)) for k in range(5)]
    config = replace(config, budgets=tuple(f"{size}B" for size in budgets))
    run_search(task, config, tmp_path)
    found = final(Record.open(tmp_path).evaluations())
    assert len(found) == len(budgets)
    for budget, evaluation in zip(budgets, reversed(found), strict=True):
        wider, size = next_step(task, config, evaluation.candidate)
        packed = PackedModel.load(packed_path(tmp_path, evaluation.trial))
        assert packed.size_bytes == size == evaluation.size_bytes <= budget
        assert size >= 0.98 * budget or wider > budget


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_codes(spec, task, tmp_path, monkeypatch):
    whole = final(run(spec, task, tmp_path / "whole"))
    step, count = Trainer._step, 0

    def dies(self, batch):
        nonlocal count
        count += 1
        self.save()
        if count == 7:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", dies)
    with suppress(KeyboardInterrupt, UsageError, FileNotFoundError, ValueError):
        run(spec, task, tmp_path / "cut")  # the engine answers an interrupt with what there is
    assert count == 7
    monkeypatch.setattr(Trainer, "_step", step)
    resumed = run(spec, task, tmp_path / "cut", resume=True)
    assert [e.weights_digest for e in final(resumed)] == [e.weights_digest for e in whole]
    assert len(resumed) == 3
    again = run(spec, task, tmp_path / "cut", resume=True)
    assert [e.trial for e in again] == [e.trial for e in resumed]


@pytest.mark.slow
def test_a_finished_model_starts_the_next_smaller_size(spec, task, tmp_path):
    both = final(run(spec, task, tmp_path / "both", budgets=("3kB", "2kB")))
    assert meets(tmp_path / "both", both[0], 3000)
    assert meets(tmp_path / "both", both[1], 2000)
    apart = run(spec, task, tmp_path / "apart", budgets=("3kB", "2kB"), inherit=False)
    first, second = final(apart)
    assert first.weights_digest == both[0].weights_digest
    assert second.weights_digest != both[1].weights_digest


def test_widths_start_from_what_another_strategy_has_measured(spec, task, tmp_path):
    evaluations = run(spec, task, tmp_path, first=("uniform",), steps=6, harvest=0, travel=1e-3)
    uniform = [e for e in evaluations if e.strategy == "uniform" and e.size_bytes <= 2000]
    start = min(uniform, key=lambda e: e.loss).candidate.assignment
    (found,) = final(evaluations)
    for name, quant in found.candidate.layers:  # nothing can be learned: only filled up
        assert min(quant.bit_widths) >= start[name].uniform


def test_a_task_without_training_data_is_refused(spec, task, tmp_path):
    with pytest.raises(UsageError, match="has no training data"):
        run(spec, replace(task, training=None), tmp_path)


def test_a_budget_below_the_floor_is_refused(spec, task, tmp_path):
    with pytest.raises(BudgetError, match="no candidate fits 100 B"):
        run(spec, task, tmp_path, budgets=("100B",))


def test_a_network_without_a_choice_is_refused(spec, task, tmp_path):
    config = RunConfig(task=spec, strategies=(FAST,), bits=(4.0,), search_samples=128)
    with pytest.raises(UsageError, match="no width to learn"):
        run_search(task, config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning": 1}, "learning must lie between 0 and 1"),
        ({"noise": "pink"}, "noise 'pink' is not one of"),
        ({"freeze": 0.5}, "has no setting 'freeze'"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(spec, task, tmp_path, settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        run(spec, task, tmp_path, **settings)
