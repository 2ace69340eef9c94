import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from quant_ops.errors import UsageError
from search.front import ParetoFront
from search.tables import (
    aligned_sizes,
    common_scale,
    compare_to_dict,
    front_to_dict,
    print_comparison,
    print_front,
)


def printed(function, *arguments):
    console = Console(file=io.StringIO(), width=150)
    function(*arguments, console)
    return console.file.getvalue()


def test_a_front_is_printed_with_its_baselines_and_its_budgets(make_front):
    _, front = make_front()
    text = printed(print_front, front)
    for e in front.points:
        assert f" {e.trial} " in text
    assert "uniform" in text
    assert "rate-distortion" in text
    assert "best at or under" in text
    assert "hypervolume" in text
    assert "92.00 % on 1,000 validation samples" in text


def test_an_empty_front_is_printed(make_front):
    _, front = make_front()
    assert "nothing is inside every budget" in printed(print_front, ParetoFront.of([], front.info))


def test_json_holds_what_the_table_shows(make_front):
    _, front = make_front()
    value = json.loads(json.dumps(front_to_dict(front), allow_nan=False))
    assert [row["trial"] for row in value["points"]] == [e.trial for e in front.points]
    row = value["points"][0]
    low, high = row["validation_interval"]
    assert low < row["validation"] < high
    assert row["ratio"] == front.info.float_size_bytes / row["size_bytes"]
    for budget in value["budgets"]:
        assert budget["front"]["trial"] == front.best(budget["size_bytes"]).trial
        assert budget["front"]["loss"] <= budget["uniform"]["loss"]
        assert budget["front"]["size_bytes"] <= budget["size_bytes"]


def test_runs_are_compared_at_equal_sizes_on_common_constants(make_front):
    _, a = make_front(n_random=0)
    _, b = make_front(n_random=60)
    wider = replace(b.info.scale, worst_loss=16.0)
    b = replace(b, info=replace(b.info, scale=wider))
    value = compare_to_dict([a, b], ["first", "second"])
    assert value["scale"]["loss"] == [0.0, 16.0]
    assert [run["hypervolume"] for run in value["runs"]] == [
        common_scale([a.info.scale, wider]).hypervolume(front.points) for front in (a, b)
    ]
    for row in value["sizes"]:
        for best in row["best"]:
            assert best is None or best["size_bytes"] <= row["size_bytes"]
    assert {s for f in (a, b) for s in f.info.budgets.sizes} <= set(aligned_sizes([a, b]))
    assert "second" in printed(print_comparison, [a, b], ["first", "second"])


def test_runs_of_different_tasks_are_not_compared(make_front):
    _, a = make_front()
    _, b = make_front(task="other")
    with pytest.raises(UsageError, match=r"x is toy \(top-1\) and y is other"):
        compare_to_dict([a, b], ["x", "y"])
