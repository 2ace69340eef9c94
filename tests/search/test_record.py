import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.errors import EnvironmentFault, UsageError
from search.evaluation import Evaluation
from search.record import JOURNAL, Record

BUDGETS = {"size_bytes": 40_000.0, "bops": 1e9}


def evaluation(seed, *, n_layers=20, n_edges=0):
    generator = np.random.default_rng(seed)
    layers = {
        f"layer{i // 20 + 1}.{i % 20}.conv{i % 2 + 1}": LayerQuant(
            (float(generator.choice([0, 1.6, 2, 4, 8])),), "mid_rise" if i % 7 == 0 else "auto"
        )
        for i in range(n_layers)
    }
    edges = {f"relu_{i}": int(generator.choice([4, 8])) for i in range(n_edges)}
    costs = {
        "size_bytes": float(generator.integers(20_000, 60_000)),
        "bops": 2e9 * generator.random(),
    }
    return Evaluation(
        Candidate.of(layers, edges), float(generator.random()), float(generator.random()), costs,
        float(generator.random()), float(generator.random()), 1.2345678, "rate-distortion", seed,
    )  # fmt: skip


@pytest.fixture
def record(tmp_path):
    return Record.create(tmp_path, name="digits", metadata={"task": "digits", "seed": 3})


def test_evaluations_come_back_equal_and_in_order(record, tmp_path):
    per_channel = Candidate.of({"a": LayerQuant((4, 4, 0, 8), "affine", 16), "b": 1.6}, {"x": 4})
    trained = replace(
        evaluation(5), candidate=per_channel, recipe="adaround", parent=1, weights_digest="ab",
        agreement=None, metric=None, notes={"forwards": 3.5},
    )  # fmt: skip
    wanted = [evaluation(0), evaluation(1, n_edges=5), trained, replace(evaluation(2), pruned=True)]
    recorded = record.append(wanted[:2], BUDGETS) + record.append(wanted[2:], BUDGETS)
    assert recorded == [e.with_trial(i) for i, e in enumerate(wanted)]
    again = Record.open(tmp_path)
    assert again.evaluations() == recorded == record.evaluations()
    assert again.metadata == {"task": "digits", "seed": 3}
    assert again.budgets == BUDGETS
    assert again.append([evaluation(9)], BUDGETS)[0].trial == 4


def test_the_study_is_one_that_optuna_understands(record):
    record.append([evaluation(i) for i in range(8)], BUDGETS)
    record.append([replace(evaluation(8), pruned=True)], BUDGETS)
    study = record.study()
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    assert study.metric_names == ["quality loss", "size_bytes"]
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 8 + [TrialState.PRUNED]
    for trial, e in zip(study.trials, record.evaluations(), strict=True):
        assert trial.values == [e.loss, e.size_bytes]
        feasible = all(e.costs[name] <= limit for name, limit in BUDGETS.items())
        assert trial.user_attrs["feasible"] == feasible
        assert all(v <= 0 for v in trial.constraints.values()) == feasible
        assert trial.constraints["size_bytes"] == pytest.approx(e.size_bytes / 40_000 - 1)
        assert len(trial.params) == 6
        assert (trial.datetime_complete - trial.datetime_start).total_seconds() == pytest.approx(
            e.seconds, abs=1e-3
        )


def test_the_old_constraints_key_is_written_for_the_dashboard(record, tmp_path):
    record.append([evaluation(0)], BUDGETS)
    logged = json.loads((tmp_path / JOURNAL).read_text().splitlines()[-1])
    constraints = record.study().trials[0].constraints
    assert logged["system_attrs"]["constraints"] == [constraints["size_bytes"], constraints["bops"]]


def test_a_trial_of_sixty_layers_with_activations_takes_less_than_2_kb(record, tmp_path):
    record.append([evaluation(i, n_layers=60, n_edges=60) for i in range(20)], BUDGETS)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines()[-20:]
    assert max(map(len, lines)) < 2000


def test_few_layers_are_parameters_by_name(record):
    record.append([replace(evaluation(0), candidate=Candidate.of({"conv": 4, "fc": 8}))], {})
    assert record.study().trials[0].params == {"bits conv": 4.0, "bits fc": 8.0}


def test_a_loss_that_is_not_a_number_is_infinite(record, tmp_path):
    record.append([replace(evaluation(0), loss=float("nan"))], BUDGETS)
    assert Record.open(tmp_path).evaluations()[0].loss == float("inf")


def test_known_candidates_are_found_but_pruned_and_trained_ones_are_not(record, tmp_path):
    plain, pruned, trained = evaluation(0), evaluation(1), evaluation(2)
    record.append(
        [plain, replace(pruned, pruned=True), replace(trained, recipe="x", weights_digest="y")],
        BUDGETS,
    )
    for each in (record, Record.open(tmp_path)):
        assert each.find(plain.candidate) == plain.with_trial(0)
        assert each.find(pruned.candidate) is None
        assert each.find(trained.candidate) is None


def test_budgets_may_change_and_facts_are_kept_beside_trials(record, tmp_path):
    record.append([evaluation(0)], BUDGETS)
    record.append([evaluation(1)], {"size_bytes": 9e9})
    record.add_fact(1, "test", 0.91)
    again = Record.open(tmp_path)
    assert again.budgets == {"size_bytes": 9e9}
    assert again.facts("test") == {1: 0.91}
    assert again.facts("latency_ms") == {}
    assert again.study().trials[1].user_attrs["feasible"]
    with pytest.raises(UsageError, match="no trial 7"):
        record.add_fact(7, "test", 0.5)


@pytest.mark.parametrize("cut", [1, 2, 500])
def test_a_line_cut_in_the_middle_is_dropped_and_kept_aside(record, tmp_path, cut):
    recorded = record.append([evaluation(i) for i in range(3)], BUDGETS)
    path = tmp_path / JOURNAL
    os.truncate(path, path.stat().st_size - cut)
    again = Record.open(tmp_path)
    assert again.evaluations() == recorded[:2]
    assert (tmp_path / "study.journal.dropped").exists()
    assert again.append([evaluation(2)], BUDGETS) == recorded[2:]
    assert Record.open(tmp_path).evaluations() == recorded


def test_zeros_after_a_power_loss_are_dropped(record, tmp_path):
    recorded = record.append([evaluation(0)], BUDGETS)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b"\0" * 300 + b"\n\0\0")
    assert Record.open(tmp_path).evaluations() == recorded


def test_damage_before_the_end_is_not_hidden(record, tmp_path):
    record.append([evaluation(i) for i in range(3)], BUDGETS)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    lines[-2] = lines[-2][:100] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(EnvironmentFault, match="damaged before its last line"):
        Record.open(tmp_path)


def test_nothing_finished_is_lost_when_the_writer_is_killed(tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from quant_ops.candidate import Candidate
        from search.evaluation import Evaluation
        from search.record import Record
        record = Record.create(Path(sys.argv[1]), name="digits", metadata={})
        e = Evaluation(Candidate.of({"conv": 4}), 1.0, 0.5, {"size_bytes": 10.0})
        while True:
            print(record.append([e], {})[0].trial, flush=True)
    """)
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= 20:
                break
        os.kill(writer.pid, signal.SIGKILL)
        printed = [int(line), *map(int, writer.stdout.read().split())]
    record = Record.open(tmp_path)
    assert len(record) >= printed[-1] + 1
    assert {trial.state for trial in record.study().trials} == {TrialState.COMPLETE}


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_later(tmp_path):
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from quant_ops.candidate import Candidate
        from quant_ops.errors import EnvironmentFault
        from search.evaluation import Evaluation
        from search.record import Record
        record = Record.create(Path(sys.argv[1]), name="digits", metadata={})
        e = Evaluation(Candidate.of({"conv": 4}), 1.0, 0.5, {"size_bytes": 10.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            while True:
                record.append([e], {})
        except EnvironmentFault as error:
            print(len(record), error)
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot write the record" in out
    assert "go on with --resume" in out
    record = Record.open(tmp_path)
    assert len(record) == int(out.split()[0]) > 0
    assert (tmp_path / "study.journal.dropped").exists()


def test_a_folder_with_a_run_is_not_written_over(record, tmp_path):
    with pytest.raises(UsageError, match="already holds a run"):
        Record.create(tmp_path, name="digits", metadata={})


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        Record.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_while_creating_leaves_no_run(tmp_path):
    (tmp_path / "study.journal.part").write_text('{"op_code": 0, "work')
    record = Record.create(tmp_path, name="digits", metadata={})
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    assert record.append([evaluation(0)], BUDGETS)[0].trial == 0


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write the record"):
        Record.create(tmp_path / "file", name="digits", metadata={})


def test_two_processes_may_share_one_storage(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = Record.create(tmp_path, name="digits", metadata={"seed": 1}, storage=url)
    second = Record.open(tmp_path, storage=url)
    first.append([evaluation(0)], BUDGETS)
    assert second.append([evaluation(1, n_edges=3)], BUDGETS)[0].trial == 1
    assert [e.trial for e in first.refresh()] == [1]
    assert [e.trial for e in second.refresh()] == [0]
    assert first.evaluations() == second.evaluations()
    with pytest.raises(UsageError, match="already holds a study"):
        Record.create(tmp_path, name="digits", metadata={}, storage=url)
    with pytest.raises(UsageError, match="should hold a study named 'other'"):
        Record.open(tmp_path, storage=url, name="other")


def test_a_storage_that_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot open the storage nonsense"):
        Record.open(tmp_path, storage="nonsense://x")


def test_a_foreign_study_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'foreign.db'}"
    optuna.create_study(storage=url, study_name="foreign")
    with pytest.raises(UsageError, match="was not written by this version of bitfront"):
        Record.open(tmp_path, storage=url)
