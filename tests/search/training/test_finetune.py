"""`--finetune` from the command line: recorded, packed, resumed after a kill, on the dashboard."""

import json
import signal
import time

import pytest

from quant_ops.packed import PackedModel
from search.cli import main
from search.dashboard import annotate
from search.finish import packed_path
from search.front import ParetoFront
from search.record import Record
from search.training.finetune import RECIPE

SEARCH = (
    "--strategy", "uniform", "--bits", "2", "--recover", "fast", "--set", "recovery.swaps=0",
)  # fmt: skip


def run_arguments(tiny, out, *more):
    return ["run", "--task", tiny("cnn_training"), *SEARCH, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def run_folder(tiny, search_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = (
        "--set",
        "finetune.steps=60",
        "--set",
        "finetune.distill=1.0",
        "--set",
        "finetune.rate=0.001",
    )
    finished = search_command(*run_arguments(tiny, folder, *more))
    assert finished.code == 0, finished.stderr
    assert "(1 of 1, 60 steps)" in finished.stderr
    return folder


def test_a_trained_trial_is_better_than_the_recovered_one_and_packed_as_recorded(run_folder):
    record = Record.open(run_folder)
    trained = next(e for e in record.evaluations() if e.recipe == RECIPE)
    parent = next(e for e in record.evaluations() if e.trial == trained.parent)
    assert parent.recipe in ("", "fast")
    assert trained.loss < parent.loss
    assert (trained.candidate, trained.size_bytes) == (parent.candidate, parent.size_bytes)
    packed = PackedModel.load(packed_path(run_folder, trained.trial))
    assert packed.digest == trained.weights_digest
    front = ParetoFront.load(run_folder / "front.json")
    assert front.best().trial == trained.trial
    assert not list((run_folder / "checkpoints").rglob("*.safetensors"))


def trained_trial(record):
    return next(e.trial for e in record.evaluations() if e.recipe == RECIPE)


def test_the_training_is_shown_on_the_dashboard(run_folder):
    record = Record.open(run_folder)
    annotate(record, ParetoFront.load(run_folder / "front.json"), run_folder)
    attributes = record.storage.get_study_system_attrs(record.study()._study_id)
    assert any(f"training-{trained_trial(record)}" in key for key in attributes)


def test_one_trial_is_trained_on_request(run_folder, capsys):
    trial = trained_trial(Record.open(run_folder))
    arguments = [
        "recover",
        str(run_folder),
        "--trial",
        str(trial),
        "--set",
        "finetune.steps=5",
        "--json",
    ]
    assert main(arguments) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["recipe"] == RECIPE
    assert main(arguments) == 0  # again, as a further trial
    assert json.loads(capsys.readouterr().out)["trial"] > row["trial"]


def test_widths_move_between_the_parts_of_a_training_at_equal_bytes(tiny, search_command, tmp_path):
    out = tmp_path / "run"
    # the table's first point is far from what a trained network needs: something moves
    arguments = [
        "run", "--task", tiny("cnn_training"), "--strategy", "uniform", "--bits", "2,3,4",
        "--granularity", "channel", "--recover", "none", "--out", str(out),
        "--budget", "1.5kB", "--set", "finetune.steps=41", "--set", "finetune.swaps=1",
    ]  # fmt: skip
    finished = search_command(*arguments)
    assert finished.code == 0, finished.stderr
    assert "moved widths of" in finished.stderr
    record = Record.open(out)
    trained = next(e for e in record.evaluations() if e.recipe == RECIPE)
    parent = next(e for e in record.evaluations() if e.trial == trained.parent)
    assert trained.candidate != parent.candidate
    assert trained.size_bytes <= parent.size_bytes
    assert PackedModel.load(packed_path(out, trained.trial)).digest == trained.weights_digest
    assert not list((out / "checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_killed_in_training_and_resumed_it_ends_with_the_same_weights(
    tiny, search_process, search_command, tmp_path
):
    steps = ("--set", "finetune.steps=150", "--set", "finetune.checkpoint_s=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert search_command(*run_arguments(tiny, whole, *steps)).code == 0
    with search_process(*run_arguments(tiny, killed, *steps)) as process:
        until = time.monotonic() + 200
        while not list(killed.rglob("checkpoints/finetune/*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert search_command("run", "--resume", killed).code == 0
    ends = [
        [e.weights_digest for e in Record.open(f).evaluations() if e.recipe == RECIPE]
        for f in (whole, killed)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 1


def test_training_without_training_data_is_refused_before_anything_runs(
    tiny, search_call, tmp_path
):
    arguments = ["run", "--task", tiny("cnn"), "--finetune", "30s", "--out", tmp_path / "x"]
    finished = search_call(*arguments)
    assert finished.code == 2
    assert "has no training data" in finished.stderr
    assert not (tmp_path / "x").exists()


def test_a_pruned_network_is_trained_without_the_channels_that_leave_it(
    tiny, search_command, tmp_path
):
    arguments = (
        "run", "--task", tiny("cnn_training"), "--strategy", "ajpq", "--bits", "0,8",
        "--budget", "3kB", "--budget", "macs=70k", "--trials", "6", "--search-samples", "64",
        "--set", "ajpq.hidden=8", "--set", "finetune.steps=60", "--set", "finetune.distill=1.0",
        "--set", "finetune.rate=0.001", "--finetune", "5m", "--threads", "1",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    finished = search_command(*arguments)
    assert finished.code == 0, finished.stderr
    evaluations = {e.trial: e for e in Record.open(tmp_path / "run").evaluations()}
    trained = [e for e in evaluations.values() if e.recipe == RECIPE]
    assert trained
    for evaluation in trained:
        parent = evaluations[evaluation.parent]
        assert evaluation.candidate == parent.candidate
        assert evaluation.loss < parent.loss
        packed = PackedModel.load(packed_path(tmp_path / "run", evaluation.trial))
        assert packed.digest == evaluation.weights_digest
    log = tmp_path / "run" / "training" / f"{trained[0].parent}.jsonl"
    in_training = json.loads(log.read_text().splitlines()[-1])["mean_bits"]
    widths = {name: q.bit_widths for name, q in trained[0].candidate.layers}
    assert any(in_training[name] > sum(w) / len(w) for name, w in widths.items())
