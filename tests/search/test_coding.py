"""Runs with `--codec entropy`: coded sizes count, and the freed bytes are spent."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from quant_ops.candidate import Candidate
from quant_ops.coded import CODECS
from quant_ops.packed import PackedModel, pack
from quant_ops.testing import random_candidate
from search.cli import main
from search.coding import Coder
from search.config import RunConfig
from search.engine import run_search
from search.evaluation import CODED
from search.finish import pack_trial, packed_path
from search.front import ParetoFront
from search.prepare import prepare
from search.record import Record
from search.tasks.table import load_task

LIMITS = (1500, 2500)


def config(tiny, **settings) -> RunConfig:
    settings = {"trials": 20, "strategies": ("rate-distortion",), "codec": "entropy", **settings}
    return RunConfig(task=tiny("cnn"), budgets=("1.5kB", "2.5kB"), **settings)


@pytest.fixture(scope="module")
def tiny_task(tiny):
    return load_task(tiny("cnn"))


@pytest.fixture(scope="module")
def run(tiny, tiny_task, tmp_path_factory):
    """Folder of a coded run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "coded"
    run_search(tiny_task, config(tiny), folder)
    return folder


@pytest.fixture(scope="module")
def recovered(tiny, tiny_task, tmp_path_factory):
    """Folder of a coded run whose front was recovered."""
    folder = tmp_path_factory.mktemp("runs") / "recovered"
    run_search(tiny_task, config(tiny, recover="fast", trials=10), folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def front_of(folder):
    return ParetoFront.load(folder / "front.json")


def require_sound(folder):
    """Every file is as long as recorded and inside the budget; a coded trial equals its parent."""
    front = json.loads((folder / "front.json").read_text())
    for row in front["points"] + front["baselines"]:
        path = folder / row["packed"]
        assert path.stat().st_size == row["size_bytes"] == row["costs"]["size_bytes"] <= LIMITS[-1]
        packed = PackedModel.load(path)
        assert packed.digest == row["weights_digest"]
        assert packed.codec == (CODED if row["recipe"].endswith(CODED) else "plain")
    assert sum(row["recipe"].endswith(CODED) for row in front["points"]) >= 4
    trials = {e.trial: e for e in Record.open(folder).evaluations()}
    for e in (e for e in trials.values() if e.coded):
        parent = trials[e.parent]
        assert e.candidate == parent.candidate
        assert e.size_bytes < parent.size_bytes
        assert (e.loss, e.recipe) == (parent.loss, " + ".join(filter(None, (parent.recipe, CODED))))
        if parent.recipe:
            a, b = (PackedModel.load(packed_path(folder, t.trial)) for t in (e, parent))
            assert pack(a.model) == b.data


def test_every_file_is_as_long_as_recorded_and_inside_the_budget(run):
    require_sound(run)


def test_the_freed_bytes_buy_a_lower_loss_at_every_size_asked_for(run):
    """Against the best plain trial of a search that had its plain share before."""
    front = front_of(run)
    trials = {e.trial: e for e in Record.open(run).evaluations()}
    for limit in LIMITS:
        best = front.best(limit)
        parent = trials[best.parent]
        assert parent.size_bytes > limit >= best.size_bytes
        fitting = [e.loss for e in trials.values() if not e.coded and e.size_bytes <= limit]
        assert parent.loss < min(fitting)


def test_spending_counts_as_trials(run):
    plain = [e for e in Record.open(run).evaluations() if not e.recipe]
    assert len(plain) <= 20


@pytest.mark.slow
def test_recovered_models_are_coded_and_keep_the_steps_of_their_recovery(recovered, capsys):
    require_sound(recovered)
    assert main(["report", str(recovered), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    coded = {row["trial"] for row in told["points"] if row["recipe"] == "fast + entropy"}
    assert coded
    assert coded <= {row["trial"] for row in told["recovery"]}


@pytest.mark.slow
def test_a_finished_run_gains_nothing_by_being_resumed(tiny_task, copy):
    before = front_of(copy)
    stored = json.loads((copy / "config.json").read_text())
    for answered in (stored["answered"], None):  # finished, and killed before it said so
        (copy / "config.json").write_text(json.dumps({**stored, "answered": answered}))
        settings = RunConfig.from_json(stored["asked"])
        after = run_search(tiny_task, settings, copy, resume=True).front
        assert after.n_evaluations == before.n_evaluations
        assert after.points == before.points


def require_written_again(prepared, folder):
    evaluation = next(e for e in front_of(folder).points if e.coded)
    path = packed_path(folder, evaluation.trial)
    data = path.read_bytes()
    path.unlink()
    assert pack_trial(prepared, evaluation, folder).data == data


def test_a_missing_coded_file_is_written_again(tiny, tiny_task, copy):
    require_written_again(prepare(tiny_task, config(tiny)), copy)


@pytest.mark.slow
def test_a_missing_coded_file_of_recovered_weights_comes_from_its_parent(
    tiny, tiny_task, recovered, tmp_path
):
    folder = shutil.copytree(recovered, tmp_path / "run")
    require_written_again(prepare(tiny_task, config(tiny, recover="fast")), folder)


def test_a_coded_size_is_predicted_to_the_byte(tiny, tiny_task, tmp_path):
    prepared = prepare(tiny_task, config(tiny))
    coder, graph = Coder(prepared, tmp_path), prepared.traced.graph
    for seed in range(8):
        drawn = random_candidate(random.Random(seed), graph)
        layers = ((name, replace(quant, group_size=None)) for name, quant in drawn.layers)
        candidate = Candidate(tuple(layers))
        model = prepared.evaluator.bank.quantize(candidate)
        assert coder.candidate_bytes(candidate) == len(pack(model, "entropy"))


def test_the_coded_size_of_a_sum_of_two_tensors_is_predicted_to_the_byte(tiny, tiny_task, tmp_path):
    ready = prepare(tiny_task, config(tiny, dual=("3.conv2",), bits=(2, 4)))
    coder = Coder(ready, tmp_path)
    for width in (0, 2, 4):  # the codes of the two depend on each other
        candidate = ready.space.uniform(2).replace({"3.conv2.residual": width})
        model = ready.evaluator.bank.quantize(candidate)
        assert coder.candidate_bytes(candidate) == len(pack(model, "entropy"))


def test_what_is_proposed_for_its_coded_size_is_not_stopped_by_plain_ones(run):
    evaluations = Record.open(run).evaluations()
    spent = [e for e in evaluations if not e.recipe and e.size_bytes > LIMITS[-1]]
    assert spent
    assert not any(e.pruned for e in spent)


@pytest.mark.parametrize("codec", CODECS)
def test_one_point_can_be_packed_anew(run, codec, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    point = front_of(run).best(2500)
    trial = point.trial if codec == "plain" else point.parent  # packed the other way before
    args = ["export", str(run), "--trial", str(trial), "--out", str(out), "--json"]
    assert main([*args, "--codec", codec]) == 0
    told = json.loads(capsys.readouterr().out)
    packed = PackedModel.load(out)
    assert told["codec"] == packed.codec == codec
    assert told["size_bytes"] == out.stat().st_size
    assert (packed.size_bytes == point.size_bytes) == (codec == "entropy")
    assert main(["verify", str(out), "--run", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["codec"] == codec
    assert "equal to trial" in facts["codes"]


def test_an_unknown_codec_is_refused_with_the_known_ones(run, tmp_path, capsys):
    out = str(tmp_path / "x")
    assert main(["export", str(run), "--trial", "1", "-o", out, "--codec", "zip"]) == 2
    assert "--codec must be one of plain, entropy, got 'zip'" in capsys.readouterr().err
    assert main(["run", "--codec", "zip"]) == 2
    assert "--codec must be one of plain, entropy, got 'zip'" in capsys.readouterr().err
