"""Recovered trials: better, of the same size, recorded with their parent, packed as they are."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import search
from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError, VerificationError
from quant_ops.packed import PackedModel
from search.budget import Budgets
from search.cli import main
from search.config import RunConfig
from search.dominance import HypervolumeScale
from search.engine import run_search
from search.evaluation import Evaluation
from search.finish import pack_trial, packed_path
from search.front import FrontInfo, ParetoFront
from search.prepare import prepare
from search.record import Record
from search.recovery import LEVELS, Recovery, RecoverySettings, judged, recover
from search.recovery_run import (
    MAX_RECOVERED,
    _worth_recovering,
    recover_trial,
    recovery_steps,
)
from search.task import Task


def toy_task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[-1].weight *= 20
    small = torch.randn(192, 3, 3, 3)
    images = nn.functional.interpolate(small, size=8, mode="bilinear")
    labels = model(images).argmax(dim=1)
    return Task(
        name="toy",
        model=model,
        calibration=[((images[:64],), None)],
        validation=[((images[64:],), labels[64:])],
    )


def config(**settings) -> RunConfig:
    return RunConfig(task=f"{__file__}:toy_task", strategies=("uniform",), **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    return folder, run_search(toy_task(), config(recover="fast", bits=(2, 3, 4)), folder)


def test_each_level_is_better_than_the_one_before():
    prepared = prepare(toy_task(), config())
    candidate = prepared.space.uniform(2)
    recovery = Recovery(prepared, settings=RecoverySettings(steps=40, most_steps=40))
    losses = [recovery.recover(candidate, level).loss for level in LEVELS]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] <= losses[1]


def test_steps_tell_what_each_gained():
    prepared = prepare(toy_task(), config())
    (evaluation,) = prepared.evaluator.evaluate_many([prepared.space.uniform(2)])
    found = recover(prepared, evaluation, "full", settings=RecoverySettings(steps=20))
    names = ["start", "rounding", "norms", "reconstruction", "norms", "distillation"]
    assert [step.name for step in found.steps] == names
    assert found.steps[0].loss == pytest.approx(evaluation.loss)
    assert found.loss == pytest.approx(prepared.evaluator.measure_model(found.model).loss)
    sizes = [PackedModel.from_model(found.model).size_bytes, evaluation.size_bytes]
    assert sizes[0] == sizes[1]


def test_no_time_leaves_the_model_alone():
    prepared = prepare(toy_task(), config())
    found = Recovery(prepared).recover(prepared.space.uniform(2), "full", budget_s=0.0)
    assert [step.name for step in found.steps] == ["start"]


def test_a_step_is_dropped_only_where_it_clearly_harms():
    before = torch.rand(200, dtype=torch.float64)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=200))
    assert judged("better", before, before - 0.1 + 0.1 * noise, seconds=0, seed=0).kept
    assert judged("same", before, before + 0.1 * (noise - noise.mean()), seconds=0, seed=0).kept
    assert not judged("worse", before, before + 0.1 + 0.1 * noise, seconds=0, seed=0).kept
    assert not judged("broken", before, before + torch.inf, seconds=0, seed=0).kept
    assert judged("mended", before + torch.inf, before, seconds=0, seed=0).kept


def test_a_run_recovers_its_front_and_packs_the_recovered_weights(finished):
    folder, result = finished
    record = Record.open(folder)
    recovered = [e for e in record.evaluations() if e.recipe == "fast"]
    assert len(recovered) == 3
    parents = {e.trial: e for e in record.evaluations()}
    for e in recovered:
        parent = parents[e.parent]
        assert (e.candidate, e.size_bytes) == (parent.candidate, parent.size_bytes)
        assert e.strategy == parent.strategy
        assert PackedModel.load(packed_path(folder, e.trial)).digest == e.weights_digest
        assert recovery_steps(record, e.trial)[0].loss == pytest.approx(parent.loss)
    assert any(point.recipe == "fast" for point in result.front.points)


def test_the_report_says_what_each_step_gained(finished, capsys):
    folder, result = finished
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recovery"]
    recovered = {p.trial for p in result.front.points if p.recipe}
    assert {row["trial"] for row in found} == recovered
    assert [s["name"] for s in found[0]["steps"]] == ["start", "rounding", "norms"]
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "recovered" in printed
    assert "norms" in printed


def test_every_size_asked_for_has_a_model_of_its_own_and_is_recovered(tmp_path):
    prepared = prepare(toy_task(), config())
    low, high = (prepared.costs["size_bytes"].cost(prepared.traced.graph, c)
                 for c in (prepared.space.uniform(2), prepared.space.uniform(6)))  # fmt: skip
    sizes = [int(low + share * (high - low)) for share in (0.3, 0.6, 1.0)]
    asked = RunConfig(
        task=f"{__file__}:toy_task",
        strategies=("rate-distortion",),
        settings={"rate-distortion.points": "2"},
        budgets=tuple(str(size) for size in sizes),
        recover="fast",
    )
    front = run_search(toy_task(), asked, tmp_path / "run").front
    best = [front.best(size) for size in sizes]
    assert len({e.trial for e in best}) == 3
    record = Record.open(tmp_path / "run")
    parents = {e.parent for e in record.evaluations() if e.recipe == "fast"}
    plain = ParetoFront.of([e for e in record.evaluations() if not e.recipe], front.info)
    assert {plain.best(size).trial for size in sizes} <= parents


def test_a_resumed_run_does_not_recover_twice(finished):
    folder, _ = finished
    n_before = len(Record.open(folder))
    run_search(toy_task(), config(recover="fast", bits=(2, 3, 4)), folder, resume=True)
    assert len(Record.open(folder)) == n_before


def test_a_lost_file_of_a_recovered_trial_is_not_replaced_by_other_weights(finished):
    folder, result = finished
    evaluation = next(e for e in Record.open(folder).evaluations() if e.recipe)
    path = packed_path(folder, evaluation.trial)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(VerificationError, match="search recover"):
        pack_trial(result.prepared, evaluation, folder)
    path.write_bytes(content)


def test_a_recovered_file_is_verified_against_its_run(finished, capsys):
    folder, _ = finished
    for evaluation in Record.open(folder).evaluations():
        path = packed_path(folder, evaluation.trial)
        if path.exists():
            assert main(["verify", str(path), "--run", str(folder), "--json"]) == 0
            # a recovery of which no step was kept has its parent's weights
            named = [evaluation.trial, evaluation.parent]
            found = json.loads(capsys.readouterr().out)["codes"]
            assert any(found.startswith(f"equal to trial {trial} ") for trial in named)


def test_one_trial_can_be_recovered_later(finished, capsys):
    folder, _ = finished
    assert main(["recover", str(folder), "--trial", "0", "--recover", "full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parent"] == 0
    assert [s["name"] for s in report["steps"]][:2] == ["start", "rounding"]
    front = search.load(folder)
    assert any(e.trial == report["trial"] for e in front) or report["steps"]
    with pytest.raises(UsageError, match="no trial 999"):
        recover_trial(folder, 999)
    with pytest.raises(UsageError, match="fast, full"):
        recover_trial(folder, 0, "none")


def found(trial, size, loss, strategy="local-search"):
    candidate = Candidate.of({"layer": float(2 + trial % 7)})
    costs = {"size_bytes": float(size)}
    return Evaluation(candidate, loss, None, costs, strategy=strategy, trial=trial)


def test_a_single_size_gets_its_whole_front_and_both_baselines_recovered():
    points = [
        found(0, 1000, 0.01), found(1, 800, 0.1), found(2, 600, 1.0), found(3, 100, 1.99),
        found(4, 900, 0.2, "uniform"), found(5, 700, 0.3, "rate-distortion"),
        found(6, 120, 1.98, "uniform"),
    ]  # fmt: skip
    scale = HypervolumeScale(100, 4000, 2.0)
    budgets = Budgets.parse(("1000B",))
    info = FrontInfo("task", "top-1", True, True, 100, 0.9, 4000, scale, budgets)
    chosen = [e.trial for e in _worth_recovering(points, info, MAX_RECOVERED["full"])]
    assert chosen[0] == 0  # the size asked for comes first
    assert sorted(chosen) == [0, 1, 2, 4, 5]  # neither of the two that know nothing
    assert [e.trial for e in _worth_recovering(points, info, 1)] == [0]
