"""A run that is killed or interrupted goes on from its last finished evaluation."""

import json
import random
import signal
import time

import pytest

from search.record import JOURNAL, Record
from search.show import read_front

ARGUMENTS = ("--budget", "1kB", "--trials", 200)


@pytest.fixture(scope="module")
def whole(search_command, tiny, tmp_path_factory):
    """Folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer = search_command("run", "--task", tiny("mlp"), *ARGUMENTS, "--out", folder)
    assert answer.code == 0, answer.stderr
    return folder


@pytest.fixture
def start(search_process, tiny, tmp_path):
    """Starts the same run in another folder, or goes on with it; returns at its phase `auto`."""
    folder = tmp_path / "run"

    def start(*more, until="auto"):
        arguments = ("run", "--task", tiny("mlp"), *ARGUMENTS, "--out", folder)
        if (folder / "config.json").exists():
            arguments = ("run", "--resume", folder, *more)
        process = search_process(*arguments)
        for line in process.stderr:
            if line.startswith(until):
                break
        return process

    start.folder = folder
    return start


def evaluations(folder):
    return [] if not (folder / JOURNAL).exists() else Record.open(folder).evaluations()


def without_times(found):
    return [(e.trial, e.candidate, e.loss, e.metric, e.strategy, dict(e.costs)) for e in found]


def front(folder):
    rows = json.loads((folder / "front.json").read_text())
    keep = ("trial", "candidate", "loss", "size_bytes", "validation", "weights_digest")
    return [[{key: row[key] for key in keep} for row in rows[k]] for k in ("points", "baselines")]


def finished_trials(folder):
    """Whole lines about trials in the journal, as another process sees them now."""
    path = folder / JOURNAL
    if not path.exists():
        return 0
    whole_lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return sum(b'"datetime_complete"' in line for line in whole_lines)


def end(process):
    stdout, stderr = process.communicate(timeout=200)
    return process.returncode, stdout, stderr


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_run_ends_as_if_undisturbed(start, whole):
    moments = random.Random(0)
    known, n_kills = [], 0
    while n_kills < 10:
        process = start(until="loading" if n_kills in (1, 4) else "auto")
        time.sleep(moments.uniform(0.0, 0.6))
        assert process.poll() is None, "the run was over before it could be killed"
        n_seen = finished_trials(start.folder)
        process.kill()
        end(process)
        n_kills += 1
        found = evaluations(start.folder)
        assert len(found) >= n_seen
        assert found[: len(known)] == known, "a recorded evaluation changed"
        known = found
    assert 0 < len(known) < 200
    code, _, stderr = end(start())
    assert code == 0, stderr
    assert evaluations(start.folder)[: len(known)] == known
    assert without_times(evaluations(start.folder)) == without_times(evaluations(whole))
    assert front(start.folder) == front(whole)


@pytest.mark.slow
def test_the_front_of_a_killed_run_can_be_exported(start, search_call, tmp_path):
    process = start()
    while finished_trials(start.folder) < 20:
        time.sleep(0.01)
    process.kill()
    end(process)
    shown = search_call("show", start.folder, "--json")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["points"]
    out = tmp_path / "x.safetensors"
    exported = search_call("export", start.folder, "--best", "1kB", "--out", out)
    assert exported.code == 0, exported.stderr
    assert search_call("verify", out, "--run", start.folder).code == 0


@pytest.mark.slow
def test_control_c_ends_with_130_and_what_is_finished_is_kept(start, whole):
    process = start()
    while finished_trials(start.folder) < 50:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = end(process)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    assert "hypervolume" in stdout
    known = evaluations(start.folder)
    assert 50 <= len(known) < 200
    assert read_front(start.folder).points
    code, _, stderr = end(start())
    assert code == 0, stderr
    assert evaluations(start.folder)[: len(known)] == known
    assert front(start.folder) == front(whole)


@pytest.mark.slow
def test_control_c_while_the_task_loads_says_one_sentence(start):
    process = start(until="loading")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, stderr = end(process)
    assert code == 130
    assert "Traceback" not in stderr
    assert not start.folder.exists() or not evaluations(start.folder)


@pytest.mark.slow
def test_a_killed_run_may_go_on_under_another_budget(start):
    process = start()
    while finished_trials(start.folder) < 30:
        time.sleep(0.01)
    process.kill()
    end(process)
    known = evaluations(start.folder)
    code, _, stderr = end(start("--budget", "700B", "--trials", 60))
    assert code == 0, stderr
    assert evaluations(start.folder)[: len(known)] == known
    points, _ = front(start.folder)
    assert points
    assert points[-1]["size_bytes"] <= 700


@pytest.mark.slow
def test_a_finished_run_is_not_searched_again(whole, search_call):
    journal = (whole / JOURNAL).read_bytes()
    before = front(whole)
    answer = search_call("run", "--resume", whole)
    assert answer.code == 0, answer.stderr
    assert (whole / JOURNAL).read_bytes() == journal
    assert front(whole) == before


def test_a_run_in_a_database_goes_on_too(search_call, tiny, tmp_path):
    url, folder = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "run"
    arguments = ("--task", tiny("mlp"), "--storage", url, "--strategy", "uniform")
    assert search_call("run", *arguments, "--trials", 3, "--out", folder).code == 0
    answer = search_call("run", "--resume", folder, "--trials", 6, "--json")
    assert answer.code == 0, answer.stderr
    assert json.loads(answer.stdout)["n_evaluations"] == 6
    out = tmp_path / "x.safetensors"
    assert search_call("export", folder, "--trial", 5, "--out", out).code == 0
    verified = search_call("verify", out, "--run", folder)
    assert verified.code == 0, verified.stderr
