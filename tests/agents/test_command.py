"""The agents through the command: runs, explanations, and bad input in one sentence each."""

import json
from pathlib import Path

import pytest

from agents.policy_store import DESCRIPTION
from quant_ops.errors import UsageError
from search.progress import ConsoleListener
from search.record import Record
from search.strategies.auto import AGENT, AGENT_SECONDS
from search.strategies.table import make_strategy
from search.testing import AdditiveTask, FakeContext, run_to_end

FAST = [
    part
    for name in ("ajpq", "haq", "amc", "two-step")
    for key, value in {"hidden": 16, "steps": 2, "proposals": 3, "members": 2}.items()
    for part in ("--set", f"{name}.{key}={value}")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(runs, search_call, tiny):
    """A run in mixed mode, made once."""
    folder = runs / "mixed"
    if not folder.exists():
        answer = search_call(
            "run", "--task", tiny("cnn"), "--strategy", "ajpq", "--budget", "1.6kB",
            "--trials", 30, "--search-samples", 64, "--probe-samples", 32, "--out", folder,
            "--threads", 1, "--json", *FAST,
        )  # fmt: skip
        assert answer.code == 0, answer.stderr
    return folder


def test_channels_get_widths_of_their_own_without_being_asked_for(finished):
    front = json.loads((finished / "front.json").read_text())
    assert front["points"]
    candidates = [e.candidate for e in Record.open(finished).evaluations() if e.strategy == "ajpq"]
    assert any(len(set(q.bit_widths)) > 1 for c in candidates for _, q in c.layers)
    assert all(row["size_bytes"] <= 1600 for row in front["points"])


def test_some_models_of_the_front_really_have_fewer_channels(finished):
    points = json.loads((finished / "front.json").read_text())["points"]
    macs = [row["costs"]["macs"] for row in points]
    assert min(macs) < max(macs)


def test_in_fixed_mode_a_limit_on_operations_is_met_by_channels_that_matter_least_for_it(
    finished, runs, search_call, tiny
):
    whole = max(e.costs["macs"] for e in Record.open(finished).evaluations())
    folder = runs / "operations"
    answer = search_call(
        "run", "--task", tiny("cnn"), "--strategy", "ajpq", "--bits", "0,8",
        "--budget", f"macs={0.7 * whole:.0f}", "--trials", 12, "--search-samples", 64,
        "--probe-samples", 32, "--out", folder, "--threads", 1, "--json", *FAST,
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    found = [e for e in Record.open(folder).evaluations() if e.strategy == "ajpq"]
    assert found
    assert all(e.costs["macs"] <= 0.7 * whole for e in found)
    assert {b for e in found for _, q in e.candidate.layers for b in q.bit_widths} == {0, 8}


def test_a_run_keeps_its_controllers_and_its_ranking(finished):
    folder = finished / "checkpoints" / "agents"
    assert (folder / "ajpq-policy" / DESCRIPTION).exists()
    assert (folder / "ajpq-importance.json").exists()


def test_show_explains_a_trial(finished, search_call):
    answer = search_call("show", finished, "--trial", 20)
    assert answer.code == 0
    assert "trial 20 by ajpq" in answer.stdout
    assert "mean bits by taylor, least to most" in answer.stdout
    story = json.loads(search_call("show", finished, "--trial", 20, "--json").stdout)
    for layer in story["layers"]:
        assert sorted(layer["ranking"]) == list(range(sum(layer["widths"].values())))
        zero = layer["widths"].get("0", 0)
        assert layer["sparsity"] == pytest.approx(zero / len(layer["ranking"]))
        ranked = layer["mean_width_by_importance"]
        assert ranked == sorted(ranked)


def test_show_explains_a_trial_that_nobody_ranked(finished, search_call):
    answer = search_call("show", finished, "--trial", 0)
    assert answer.code == 0
    assert "trial 0 by uniform" in answer.stdout
    assert "uniform ranks no channels" in answer.stdout


def test_show_refuses_a_trial_that_is_not_there(finished, search_call):
    answer = search_call("show", finished, "--trial", 999)
    assert answer.code == 2
    assert "has no trial 999; it has 30" in answer.stderr


@pytest.mark.parametrize("strategy", ["haq", "amc", "two-step", "rate-distortion,nsga2,ajpq"])
def test_every_agent_runs_and_several_share_a_record(strategy, runs, search_call, tiny):
    out = runs / strategy.replace(",", "-")
    answer = search_call(
        "run", "--task", tiny("mlp"), "--strategy", strategy, "--trials", 24, "--budget", "700",
        "--threads", 1, "--out", out, "--json", *FAST,
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    assert json.loads(answer.stdout)["n_evaluations"] >= 20


def test_fixed_mode_leaves_channels_out_or_gives_them_one_width(runs, search_call, tiny):
    answer = search_call(
        "run", "--task", tiny("mlp"), "--strategy", "ajpq", "--bits", "0,4", "--trials", 16,
        "--threads", 1, "--out", runs / "fixed", "--json", *FAST,
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    record = Record.open(runs / "fixed").evaluations()
    used = {w for e in record for _, quant in e.candidate.layers for w in quant.bit_widths}
    assert used == {0.0, 4.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2,4"], "nothing to prune: no layer may have 0 bits"),
        (["--granularity", "layer"], "nothing to prune: widths are per layer here"),
        (["--pin", "*=4"], "nothing to prune: every layer is pinned"),
        (["--pin", "0=4", "--pin", "2=4"], "the channels of 4 are tied to the network's outputs"),
        (["--budget", "100"], "no candidate fits 100 B of size_bytes: the reachable range is"),
        (["--pin", "4=0"], "layer '4' cannot be pinned to 0 bits"),
        (["--set", "ajpq.policy=/nowhere"], "holds no policy of 'ajpq'"),
        (["--set", "ajpq.algorithm=ppo"], "algorithm must be one of ddpg, td3, sac, got 'ppo'"),
        (["--set", "ajpq.importance=x"], "importance must be one of weight-sum"),
        (["--set", "ajpq.follow=2"], "follow and tilt lie in [0, 1]"),
    ],
)
def test_bad_input_gets_one_sentence(options, message, search_call, tiny, tmp_path):
    out = tmp_path / "run"
    answer = search_call("run", "--task", tiny("mlp"), "--strategy", "ajpq", "--out", out, *options)
    assert answer.code == 2
    assert message in " ".join(answer.stderr.split())
    assert "Traceback" not in answer.stderr
    assert not out.exists() or not any(out.iterdir())


def test_progress_says_episode_reward_and_best(finished):
    task = AdditiveTask.make(n_layers=3, n_groups=4, widths=(0.0, 2.0, 4.0))
    context = FakeContext(task, trials=20)
    run_to_end(make_strategy("ajpq", {"hidden": 16, "steps": 0}), context)
    assert context.reports
    assert all(text.startswith("episode ") for text in context.reports)
    assert all("reward" in text and "best" in text for text in context.reports)
    listener = ConsoleListener(trials=20)
    listener.on_report(context.reports[0])
    listener.on_phase("another")  # what one strategy said does not stand beside the next


def test_auto_gives_long_runs_an_agent():
    task = AdditiveTask.make(n_layers=2, n_groups=4, widths=(0.0, 2.0, 4.0))
    for seconds, joins in ((AGENT_SECONDS, True), (AGENT_SECONDS - 1, False), (None, False)):
        context = FakeContext(task, trials=48, seconds=seconds)
        run_to_end(make_strategy("auto", {"points": 4}), context)
        assert any(context.reports) == joins
        assert (context.path is not None and Path(context.path, "agents").exists()) == joins


def test_auto_leaves_the_agent_out_where_nothing_can_be_pruned():
    task = AdditiveTask.make(n_layers=3)
    with pytest.raises(UsageError, match="nothing to prune"):
        make_strategy(AGENT).check(task.space)
    context = FakeContext(task, trials=60, seconds=AGENT_SECONDS)
    assert run_to_end(make_strategy("auto"), context)
    assert not context.reports
