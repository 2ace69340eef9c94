"""Widths move to where a bit is worth more, one step at a time, and never above the size."""

import pytest
import torch
from torch import nn

from quant_ops.packed import PackedModel
from search.config import RunConfig
from search.engine import run_search
from search.prepare import prepare
from search.reallocation import as_searched, reallocated
from search.record import Record
from search.task import Task


def toy_task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[-1].weight *= 20
    images = nn.functional.interpolate(torch.randn(192, 3, 3, 3), size=8, mode="bilinear")
    return Task(
        name="toy",
        model=model,
        calibration=[((images[:64],), None)],
        validation=[((images[64:],), model(images[64:]).argmax(dim=1))],
    )


def config(**settings) -> RunConfig:
    return RunConfig(task=f"{__file__}:toy_task", strategies=("uniform",), **settings)


@pytest.fixture(scope="module")
def prepared():
    return prepare(toy_task(), config(recover="fast"))


def lopsided(prepared):
    """The first layer far too wide, the second far too narrow."""
    first, second, head = (choice.name for choice in prepared.space.layers)
    return prepared.space.uniform(4).replace({first: 8, second: 1, head: 4})


def test_a_lopsided_model_gets_better_at_its_own_size(prepared):
    candidate = lopsided(prepared)
    model = prepared.evaluator.bank.quantize(candidate)
    size_of = prepared.costs["size_bytes"].cost
    graph = prepared.traced.graph
    limit = int(size_of(graph, candidate)) + 100  # room for one step of the narrow layer
    found = reallocated(prepared, model, limit)
    assert found is not None
    assert size_of(graph, found) <= limit
    before, after = prepared.evaluator.evaluate_many([candidate, found])
    assert after.loss < before.loss
    legal = {choice.name: choice.bit_widths for choice in prepared.space.layers}
    for (name, was), (_, now) in zip(candidate.layers, found.layers, strict=True):
        assert abs(legal[name].index(was.uniform) - legal[name].index(now.uniform)) <= 1


def test_no_more_layers_move_than_allowed(prepared):
    candidate = lopsided(prepared)
    model = prepared.evaluator.bank.quantize(candidate)
    found = reallocated(prepared, model, 10**6, max_changes=1)
    moved = [a for a, b in zip(candidate.layers, found.layers, strict=True) if a != b]
    assert len(moved) == 1


def test_nothing_moves_where_every_layer_is_at_its_widest(prepared):
    model = prepared.evaluator.bank.quantize(prepared.space.largest())
    size = PackedModel.from_model(model).size_bytes
    assert reallocated(prepared, model, size) is None


def test_a_read_file_under_the_networks_names_runs_like_the_model(prepared):
    candidate = lopsided(prepared)
    model = prepared.evaluator.bank.quantize(candidate)
    named = as_searched(PackedModel.from_model(model).model, prepared, candidate)
    assert prepared.evaluator.measure_model(named) == prepared.evaluator.measure_model(model)


def test_a_run_moves_widths_at_the_size_asked_for_and_only_once(tmp_path):
    asked = config(
        recover="full",
        bits=(2, 3, 4, 6),
        budgets=("900",),
        settings={"recovery.steps": "5", "recovery.most_steps": "5", "recovery.epochs": "0.5"},
    )
    run_search(toy_task(), asked, tmp_path / "run")
    evaluations = Record.open(tmp_path / "run").evaluations()
    moved = [e for e in evaluations if e.strategy == "reallocation"]
    assert len(moved) in (0, 2)  # the candidate and its recovery
    again = run_search(toy_task(), asked, tmp_path / "run", resume=True)
    assert len(Record.open(tmp_path / "run")) == len(evaluations) == again.front.n_evaluations
