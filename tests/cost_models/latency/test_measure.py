from dataclasses import replace

import pytest

from cost_models.latency.grid import grid_walks, task_walks
from cost_models.latency.measure import Plan, measure_table
from quant_ops.errors import UsageError

PLAN = Plan(rounds=3, passes=1)


@pytest.fixture
def walks(graph, make_table):
    empty = make_table([])
    return task_walks(graph, empty.kernel_for, empty.weight_bytes)


def test_what_is_measured_is_the_call_without_the_run(formula_backend, walks, expected):
    table = measure_table(formula_backend, walks, name="t", plan=PLAN)
    assert table.complete
    assert table.call_overhead == 3.0
    for entry in table.entries:
        assert len(entry.rounds) == 3
        assert entry.time == pytest.approx(expected(entry.work, entry.kernel), abs=1e-3)
        assert entry.spread == 0


def test_an_interrupted_measurement_goes_on_where_it_was(formula_backend, walks):
    kept = []

    def stop(table):
        kept.append(table)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_table(formula_backend, walks, name="t", plan=PLAN, save=stop)
    assert not kept[-1].complete
    assert {len(e.rounds) for e in kept[-1].entries} == {2}
    rounds = []
    table = measure_table(
        formula_backend, walks, name="t", plan=PLAN, known=kept[-1], save=rounds.append
    )
    assert table.complete
    assert {len(e.rounds) for e in table.entries} == {3}


def test_a_complete_table_is_extended_and_not_measured_again(formula_backend, walks):
    first = measure_table(formula_backend, walks[:3], name="t", plan=PLAN)
    formula_backend.prepared.clear()
    table = measure_table(formula_backend, walks, name="t", plan=PLAN, known=first)
    again = {(e.work, e.kernel, e.resident_bytes) for e in first.entries}
    assert len(formula_backend.prepared) == sum(call not in again for w in walks for call in w)
    assert set(first.entries) <= set(table.entries)


@pytest.mark.parametrize(
    "change",
    [
        {"device": {"name": "another", "fingerprint": "f1"}},
        {"libraries": {"formula": "2"}},
        {"backend": "guess"},
    ],
)
def test_measurements_of_two_devices_are_not_mixed(formula_backend, walks, change):
    first = measure_table(formula_backend, walks[:1], name="t", plan=PLAN)
    with pytest.raises(UsageError, match="was made with another"):
        measure_table(formula_backend, walks, name="t", plan=PLAN, known=replace(first, **change))


def test_progress_ends_with_the_last_round(formula_backend, walks):
    steps = []
    measure_table(
        formula_backend, walks, name="t", plan=PLAN, progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == (3, 3, "round 3 of 3, 0 s left")


def test_a_grid_measures_every_kernel_in_small_and_large_networks(make_table):
    empty = make_table([])
    walks = grid_walks(empty.kernel_for, empty.weight_bytes)
    calls = [call for walk in walks for call in walk]
    assert len(set(calls)) == len(calls)
    assert {kernel for _, kernel, _ in calls} == {"float32", "int8", "weight4"}
    large = {w for w, k, resident in calls if k == "float32" and resident > 3e7}
    small = {w for w, k, resident in calls if k == "float32" and 0 < resident < 3e7}
    assert large & small
