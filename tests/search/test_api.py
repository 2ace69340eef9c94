"""The three lines of Python."""

import torch

import search
from quant_ops.packed import PackedModel


def test_three_lines_search_a_model_that_runs_and_saves(tiny_tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = tiny_tasks.cnn()
    front = search.run(task, budget="30kB", trials=30)
    model = front.best("2kB")
    picture = front.plot()
    assert model.size_bytes <= 2000
    assert picture.read_bytes().startswith(b"\x89PNG")
    (images,), labels = task.validation[0]
    with torch.no_grad():
        logits = model(images)
        accuracy = (logits.argmax(dim=1) == labels).double().mean()
    assert float(accuracy) == front.best_point("2kB").metric
    model.save(tmp_path / "mine.safetensors")
    again = PackedModel.load(tmp_path / "mine.safetensors")
    assert torch.equal(again(images), logits)
    assert (tmp_path / "runs" / "tiny-cnn-1" / "front.json").exists()


def test_a_front_is_iterated_over_loaded_and_refuses_what_it_has_not(tiny_tasks, tmp_path):
    import pytest

    from quant_ops.errors import BudgetError, NothingFeasibleError, UsageError

    task = tiny_tasks.mlp()
    front = search.run(task, budget=["2kB", "bops=10M"], trials=6, out=tmp_path / "run", seed=3)
    assert len(front) == len(list(front)) >= 2
    loaded = search.load(tmp_path / "run")
    assert [p.trial for p in loaded] == [p.trial for p in front]
    assert front.best().size_bytes == max(p.size_bytes for p in front)
    assert front.best(10**6).digest == front.best().digest
    with pytest.raises(NothingFeasibleError, match="the smallest has"):
        front.best("10B")
    with pytest.raises(BudgetError, match="is not a size"):
        front.best("small")
    with pytest.raises(UsageError, match="not empty"):
        search.run(task, budget="2kB", trials=6, out=tmp_path / "run")
    with pytest.raises(BudgetError, match="reachable range"):
        search.run(task, budget="10B", out=tmp_path / "other")
    longer = search.run(task, budget="2kB", trials=9, out=tmp_path / "run", resume=True, seed=3)
    assert {p.trial for p in longer} <= set(range(9))


def test_a_task_may_be_named(tiny, tmp_path):
    front = search.run(tiny("mlp"), trials=3, strategies=("uniform",), out=tmp_path / "run")
    assert {p.strategy for p in front} == {"uniform"}


def test_a_setting_that_does_not_exist_is_said(tiny_tasks, tmp_path):
    import pytest

    from quant_ops.errors import UsageError

    with pytest.raises(UsageError, match="trails"):
        search.run(tiny_tasks.mlp(), trails=3, out=tmp_path / "run")
    with pytest.raises(UsageError, match="budgets"):
        search.run(tiny_tasks.mlp(), "2kB", budgets=("2kB",), out=tmp_path / "run")
