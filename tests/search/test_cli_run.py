"""`search run` and what looks at its folder, through the command."""

import json
import shutil

import pytest

from quant_ops.packed import PackedModel

LIMIT = 2500


@pytest.fixture(scope="module")
def finished(search_command, tiny, tmp_path_factory):
    """(folder, answer) of a run in a process of its own; tests leave the folder as it is."""
    folder = tmp_path_factory.mktemp("runs") / "cnn"
    answer = search_command(
        "run", "--task", tiny("cnn"), "--budget", "2.5kB", "--budget", "1.5kB", "--trials", 40,
        "--out", folder, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    return folder, answer


@pytest.fixture
def folder(finished):
    return finished[0]


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(folder, tmp_path / "run")


def front_of(folder):
    return json.loads((folder / "front.json").read_text())


def test_a_run_leaves_a_record_a_front_plots_and_packed_files(finished):
    folder, answer = finished
    front = front_of(folder)
    printed = json.loads(answer.stdout)
    assert printed["points"] == front["points"]
    assert printed["folder"] == str(folder)
    assert (front["format"], front["version"], front["task"]) == ("bitfront-front", 1, "tiny-cnn")
    assert front["n_evaluations"] == 40
    assert front["requested"] == {"size_bytes": [1500, LIMIT]}
    assert front["float"]["test"] is None
    for name in ("config.json", "study.journal", "front.png", "front.html", "bits.png"):
        assert (folder / name).stat().st_size > 500
    assert "Traceback" not in answer.stderr
    assert "Warning" not in answer.stderr


def test_every_packed_file_is_as_long_as_recorded_and_inside_the_budget(folder):
    front = front_of(folder)
    for row in front["points"] + front["baselines"]:
        path = folder / row["packed"]
        assert path.stat().st_size == row["size_bytes"] == row["costs"]["size_bytes"] <= LIMIT
        assert PackedModel.load(path).digest == row["weights_digest"]


def test_losses_fall_as_sizes_grow_and_every_row_is_whole(folder):
    points = front_of(folder)["points"]
    assert len(points) >= 8
    sizes, losses = ([p[key] for p in points] for key in ("size_bytes", "loss"))
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    for row in points:
        assert row["test"] is None
        assert 0 <= row["validation"] <= 1
        assert 0 <= row["agreement"] <= 1
        assert row["mean_weight_bits"] > 0
        assert {"size_bytes", "macs", "bops", "ram_bytes"} <= set(row["costs"])


def test_the_front_is_nowhere_worse_than_a_baseline_of_equal_size(folder):
    front = front_of(folder)
    assert {row["strategy"] for row in front["baselines"]} == {"uniform", "rate-distortion"}
    for baseline in front["baselines"]:
        best = min(p["loss"] for p in front["points"] if p["size_bytes"] <= baseline["size_bytes"])
        assert best <= baseline["loss"]


def test_the_front_beats_uniform_at_most_widths(folder):
    front = front_of(folder)
    uniform = [row for row in front["baselines"] if row["strategy"] == "uniform"]
    better = [
        any(p["size_bytes"] <= u["size_bytes"] and p["loss"] < u["loss"] for p in front["points"])
        for u in uniform
    ]
    assert sum(better) >= 3


def test_show_and_report_print_the_front(folder, search_call):
    shown, reported = search_call("show", folder), search_call("report", folder)
    assert shown.code == reported.code == 0
    assert shown.stdout == reported.stdout
    for row in front_of(folder)["points"]:
        assert f"{row['trial']}  {row['strategy']}" in shown.stdout
    for text in ("uniform", "rate-distortion", "2.50 kB", "1.50 kB", "hypervolume", "±"):
        assert text in shown.stdout
    rows = json.loads(search_call("show", folder, "--json").stdout)
    assert [r["trial"] for r in rows["points"]] == [p["trial"] for p in front_of(folder)["points"]]
    assert [r["size_bytes"] for r in rows["budgets"]] == [1500, LIMIT]


@pytest.mark.slow
def test_the_test_split_is_read_once_and_by_report_alone(copy, search_call, tmp_path, monkeypatch):
    reads = tmp_path / "reads"
    monkeypatch.setenv("TINY_TASK_READS", str(reads))
    config = json.loads((copy / "config.json").read_text())
    assert not reads.exists()
    first = search_call("report", copy, "--test")
    assert first.code == 0, first.stderr
    assert reads.read_text() == "read\n"
    front = front_of(copy)
    assert front["float"]["test"] > 0.8
    uniform = [p for p in front["baselines"] if p["strategy"] == "uniform"]
    assert all(0 < p["test"] <= 1 for p in front["points"] + uniform)
    again = search_call("report", copy, "--test")
    assert again.stdout == first.stdout
    assert reads.read_text() == "read\n"
    assert json.loads((copy / "config.json").read_text()) == config
    assert search_call("show", copy).stdout == first.stdout


def test_the_test_split_is_read_for_the_points_that_are_named(copy, search_call):
    points = front_of(copy)["points"]
    first = points[0]["trial"]
    answer = search_call("report", copy, "--test", "--trial", first)
    assert answer.code == 0, answer.stderr
    read = {p["trial"]: p.get("test") for p in front_of(copy)["points"]}
    assert read.pop(first) > 0
    assert not any(read.values())
    unknown = search_call("report", copy, "--test", "--trial", 4321)
    assert unknown.code == 2
    assert "has no trial 4321; `search show" in unknown.stderr
    alone = search_call("report", copy, "--trial", first)
    assert alone.code == 2
    assert "give --test, too" in alone.stderr


def test_a_task_without_a_test_split_is_told_so(search_call, tiny, tmp_path):
    search_call("run", "--task", tiny("mlp"), "--trials", 3, "--out", tmp_path / "mlp")
    answer = search_call("report", tmp_path / "mlp", "--test")
    assert answer.code == 2
    assert "has no test split" in answer.stderr


def test_export_writes_a_file_and_test_vectors_that_verify(folder, search_call, tiny, tmp_path):
    best = max(
        (p for p in front_of(folder)["points"] if p["size_bytes"] <= 1500),
        key=lambda p: p["size_bytes"],
    )
    out = tmp_path / "best.safetensors"
    exported = search_call("export", folder, "--best", "1.5kB", "--out", out, "--json")
    assert exported.code == 0, exported.stderr
    assert json.loads(exported.stdout)["trial"] == best["trial"]
    assert out.stat().st_size == best["size_bytes"]
    assert out.read_bytes() == (folder / best["packed"]).read_bytes()
    assert (tmp_path / "best.vectors.safetensors").exists()
    plain = search_call("verify", out)
    assert plain.code == 0
    assert "32 run" in plain.stdout
    full = search_call("verify", out, "--run", folder, "--task", tiny("cnn"), "--json")
    assert full.code == 0, full.stderr
    facts = json.loads(full.stdout)
    assert f"equal to trial {best['trial']}" in facts["codes"]
    assert facts["quality_loss"] == best["loss"]
    assert f"{100 * best['validation']:.2f} %" in facts["metric"]
    assert "may fall either way" in facts["narrow_margins"]


def test_export_of_a_trial_off_the_front_quantizes_it_again(copy, search_call, tmp_path):
    front = front_of(copy)
    packed = {p["trial"] for p in front["points"] + front["baselines"]}
    trial = next(t for t in range(40) if t not in packed)
    out = tmp_path / "other" / "x.safetensors"
    exported = search_call("export", copy, "--trial", trial, "--out", out)
    assert exported.code == 0, exported.stderr
    assert search_call("verify", out, "--run", copy).code == 0
    refused = search_call("export", copy, "--trial", trial, "--out", out)
    assert refused.code == 2
    assert "--force" in refused.stderr
    assert search_call("export", copy, "--trial", trial, "--out", out, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--best", "100B"], 3, "the front reaches from"),
        (["--best", "rather small"], 2, "is not a size"),
        (["--trial", "9999"], 2, "holds no finished trial 9999"),
        ([], 2, "either --trial NUMBER or --best SIZE"),
        (["--trial", "1", "--best", "2kB"], 2, "either --trial NUMBER or --best SIZE"),
        (["--trial", "1", "--to", "gif"], 2, "--to must be one of packed"),
    ],
)
def test_export_of_what_is_not_there(folder, search_call, tmp_path, arguments, code, message):
    answer = search_call("export", folder, *arguments, "--out", tmp_path / "x")
    assert (answer.code, message in answer.stderr) == (code, True), answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_compare_puts_two_runs_side_by_side(folder, copy, search_call, tiny, tmp_path):
    answer = search_call("compare", folder, copy)
    assert answer.code == 0
    assert "hypervolume" in answer.stdout
    assert json.loads(search_call("compare", folder, copy, "--json").stdout)
    search_call("run", "--task", tiny("mlp"), "--trials", 2, "--out", tmp_path / "mlp")
    other = search_call("compare", folder, tmp_path / "mlp")
    assert other.code == 2
    assert "one task" in other.stderr


def test_a_smaller_budget_on_a_finished_run_is_answered_from_what_was_measured(copy, search_call):
    before = front_of(copy)
    n_probes = len((copy / "probes.jsonl").read_text().splitlines())
    answer = search_call("run", "--resume", copy, "--budget", "1.2kB")
    assert answer.code == 0, answer.stderr
    after = front_of(copy)
    assert after["points"][-1]["size_bytes"] <= 1200
    assert 40 <= after["n_evaluations"] <= 40 + 24
    assert len((copy / "probes.jsonl").read_text().splitlines()) == n_probes
    for old in before["points"]:
        if old["size_bytes"] <= 1200:
            smaller = [p for p in after["points"] if p["size_bytes"] <= old["size_bytes"]]
            assert min(p["loss"] for p in smaller) <= old["loss"]
    again = search_call("run", "--resume", copy, "--json")
    assert json.loads(again.stdout)["n_evaluations"] == after["n_evaluations"]


def test_a_pin_on_a_finished_run_is_kept(copy, search_call):
    answer = search_call("run", "--resume", copy, "--pin", "*conv1=4", "--bits", "2,4,8")
    assert answer.code == 0, answer.stderr
    points = front_of(copy)["points"]
    assert {p["candidate"]["layers"]["3.conv1"] for p in points} == {"4"}
    widths = {w for p in points for w in p["candidate"]["layers"].values()}
    assert widths <= {"2", "4", "8"}


def test_more_trials_on_a_finished_run_go_on_with_it(copy, search_call):
    answer = search_call("run", "--resume", copy, "--trials", 44, "--json")
    assert answer.code == 0, answer.stderr
    assert json.loads(answer.stdout)["n_evaluations"] == 44


@pytest.mark.slow
def test_max_drop_names_the_smallest_model_that_is_good_enough(copy, search_call):
    answer = search_call("run", "--resume", copy, "--max-drop", 1.5, "--json")
    assert answer.code == 0, answer.stderr
    printed = json.loads(answer.stdout)
    wanted = next(
        p["trial"]
        for p in printed["points"]
        if p["validation"] >= printed["float"]["validation"] - 0.015 - 1e-9
    )
    assert printed["within_max_drop"] == wanted
    assert f"trial {wanted}" in search_call("run", "--resume", copy, "--max-drop", 1.5).stdout
    hopeless = search_call("run", "--resume", copy, "--max-drop", -50)
    assert hopeless.code == 3
    assert "allow a larger drop" in hopeless.stderr


def test_pins_widths_and_several_strategies_share_one_record(search_call, tiny, tmp_path):
    answer = search_call(
        "run", "--task", tiny("cnn"), "--trials", 12, "--bits", "2,4,8", "--pin", "0=8",
        "--strategy", "uniform,random,tpe", "--budget", "bops=30M", "--budget", "3kB",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    assert "bops" in answer.stdout
    front = front_of(tmp_path / "run")
    assert front["budgets"] == {"bops": 30e6, "size_bytes": 3000}
    for row in front["points"]:
        assert row["costs"]["bops"] <= 30e6
        layers = row["candidate"]["layers"]
        assert layers["0"] == "8"
        assert set(layers.values()) <= {"2", "4", "8"}
    from search.record import Record

    names = [e.strategy for e in Record.open(tmp_path / "run").evaluations()]
    assert sorted(set(names)) == ["random", "tpe", "uniform"]


def test_activation_bits_are_judged_by_the_integers_of_the_file(search_call, tiny, tmp_path):
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    answer = search_call(
        "run", "--task", tiny("cnn"), "--trials", 12, "--activation-bits", "4,8",
        "--out", run, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    point = json.loads(answer.stdout)["points"][-1]
    assert set(point["candidate"]["activations"].values()) <= {4, 8}
    assert point["validation"] > 0.8
    assert search_call("export", run, "--trial", point["trial"], "--out", out).code == 0
    facts = json.loads(
        search_call("verify", out, "--task", tiny("cnn"), "--run", run, "--json").stdout
    )
    assert facts["quality_loss"] == point["loss"]
    assert "largest relative difference 0" in facts["test_vectors"]


def test_widths_per_channel_remove_channels(search_call, tiny, tmp_path):
    answer = search_call(
        "run", "--task", tiny("cnn"), "--trials", 24, "--granularity", "channel",
        "--bits", "0,2,4,8", "--strategy", "uniform,random,nsga2", "--out", tmp_path / "run",
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    front = front_of(tmp_path / "run")
    layers = [p["candidate"]["layers"] for p in front["points"]]
    assert any("," in text for row in layers for text in row.values())
    assert min(p["costs"]["macs"] for p in front["points"]) < max(
        p["costs"]["macs"] for p in front["baselines"]
    )
    for row in front["points"][:3]:
        path = tmp_path / "run" / row["packed"]
        assert path.stat().st_size == row["size_bytes"]
        assert search_call("verify", path, "--run", tmp_path / "run").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo", "regression", "mlp"])
def test_other_networks_run_to_the_end(search_call, tiny, tmp_path, name):
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    answer = search_call("run", "--task", tiny(name), "--trials", 15, "--out", run, "--json")
    assert answer.code == 0, answer.stderr
    front = json.loads(answer.stdout)
    last = front["points"][-1]
    assert last["loss"] < 0.01
    assert last["validation"] == pytest.approx(front["float"]["validation"], abs=0.02)
    assert (last["agreement"] is not None) == (name == "mlp")
    assert search_call("export", run, "--trial", last["trial"], "--out", out).code == 0
    verified = search_call("verify", out, "--task", tiny(name), "--run", run, "--json")
    assert verified.code == 0, verified.stderr
    assert json.loads(verified.stdout)["quality_loss"] == last["loss"]


def test_inspect_says_what_becomes_of_every_layer(search_call, tiny):
    answer = search_call("inspect", "--task", tiny("zoo"), "--budget", "3kB", "--json")
    assert answer.code == 0, answer.stderr
    report = json.loads(answer.stdout)
    layers = {layer["name"]: layer for layer in report["layers"]}
    kept = {name for name, layer in layers.items() if layer["kept_float_because"]}
    assert kept == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert "lstm runs in float" in layers["lstm.weight_ih_l0"]["kept_float_because"]
    searched = {"embedding", "conv1d", "stem", "depthwise", "grouped", "conv3d", "up", "shared"}
    assert all(layers[name]["bit_widths"][-1] == 8 for name in searched)
    assert layers["stem"]["macs"] == 8 * 8 * 8 * 9
    assert layers["shared"]["macs"] == 2 * 14 * 14
    assert {"layers": ["up", "shared"], "channels": 4} in report["ties"]
    low, high = report["reachable"]["size_bytes"]
    assert low < 3000 < high
    assert report["budgets"] == {"size_bytes": 3000}
    text = search_call("inspect", "--task", tiny("zoo"), "--pin", "stem=4").stdout
    assert "pinned: 4 bits" in text
    assert "float: operator lstm runs in float" in text
    assert "sensitivity measurements" in text


def test_lists_of_what_there_is(search_call):
    for command, word in (
        ("strategies", "rate-distortion"),
        ("tasks", "digits"),
        ("targets", "int4-int8"),
    ):
        answer = search_call(command)
        assert answer.code == 0
        assert word in answer.stdout
    assert "auto" in {row["name"] for row in json.loads(search_call("strategies", "--json").stdout)}


def test_without_a_folder_runs_are_numbered(search_call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert search_call("run", "--task", tiny("mlp"), "--trials", 2).code == 0
        assert (tmp_path / "runs" / f"tiny-mlp-{number}" / "front.json").exists()
