"""Whatever is wrong, the command says one clear sentence, ends with its code, writes nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

BAD_TASKS = Path(__file__).parent / "data" / "bad_tasks.py"


@pytest.fixture(scope="module")
def run_folder(search_command, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    answer = search_command("run", "--task", tiny("mlp"), "--trials", 6, "--out", folder)
    assert answer.code == 0, answer.stderr
    return folder


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def complaint(answer, code):
    """The one sentence on stderr, progress aside."""
    assert answer.code == code, (answer.code, answer.stderr, answer.stdout)
    assert "Traceback" not in answer.stderr
    lines = [line for line in answer.stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("search: ")
    assert len(lines[0]) < 700
    return lines[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "no_such_method"),
        ("no_validation", "no validation data"),
        ("no_calibration", "no calibration data"),
        ("not_a_task", "must return a search.task.Task, but returned Sequential"),
        ("one_shot_validation", "can be read only once"),
        ("not_a_number", "'2.weight' holds 1 NaN or infinite values of 24"),
        ("infinite_inputs", "not finite"),
        ("branching", "torch.export cannot capture _Branching at"),
        ("unknown_operator", "is not on the list of operators"),
        ("nothing_to_quantize", "no layer that can be quantized"),
        ("wrong_metric", "'broken' must give one value per sample"),
        ("raising_metric", "the metric of this task is broken"),
        ("other_checkpoint", "size mismatch"),
        ("wrong_inputs", "cannot be judged on the task's validation data"),
        ("no_such_function", "no_such_function"),
    ],
)
def test_a_task_that_cannot_be_used(search_call, tmp_path, function, message):
    answer = search_call("run", "--task", f"{BAD_TASKS}:{function}", "--out", tmp_path / "run")
    assert message in complaint(answer, 2)
    assert list(tmp_path.iterdir()) == []


def test_the_place_that_cannot_be_captured_is_in_the_users_file(search_call, tmp_path):
    answer = search_call("run", "--task", f"{BAD_TASKS}:branching", "--out", tmp_path / "run")
    number = next(i for i, x in enumerate(BAD_TASKS.read_text().splitlines(), 1) if "x.sum()" in x)
    assert "bad_tasks.py" in complaint(answer, 2)
    assert f"line {number}" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digitz"], "did you mean 'digits'"),
        (["--task", "nowhere.py:make_task"], "does not exist"),
        (["--budget", "four MB"], "is not a size"),
        (["--budget", "-4MB"], "is not a size"),
        (["--budget", "0B"], "less than one byte"),
        (["--budget", "speed=3"], "is not a cost"),
        (["--budget", "latency=2ms"], "needs --latency-table"),
        (["--budget", "100B"], "the reachable range is"),
        (["--budget", "bops=1"], "the reachable range is"),
        (["--bits", "9"], "--bits 9"),
        (["--bits", "0"], "nothing is left"),
        (["--activation-bits", "16"], "from 2 to 8"),
        (["--pin", "nolayer=4"], "names no layer"),
        (["--pin", "0"], "NAME=VALUE"),
        (["--pin", "edge:x=8"], "add --activation-bits 8"),
        (["--activation-bits", "4", "--pin", "edge:nothing=8"], "names no activation edge"),
        (["--activation-bits", "4", "--pin", "edge:*=1"], "whole numbers from 2 to 8"),
        (["--pin", "0=11"], "--pin"),
        (["--pin", "0=0"], "cannot be pinned to 0"),
        (["--strategy", "magic"], "no strategy 'magic'"),
        (["--set", "auto.magic=3"], "no setting 'magic'"),
        (["--set", "points=3"], "NAME.KEY=VALUE"),
        (["--target", "toaster"], "no target 'toaster'"),
        (["--target", "matmul-nbits", "--granularity", "channel"], "asks for finer"),
        (["--granularity", "atom"], "--granularity must be one of"),
        (["--time-limit", "soon"], "soon"),
    ],
)
def test_an_argument_that_cannot_be_used(search_call, tiny, tmp_path, arguments, message):
    task = [] if "--task" in arguments else ["--task", tiny("mlp")]
    answer = search_call("run", *task, *arguments, "--trials", 3, "--out", tmp_path / "run")
    assert message in complaint(answer, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--trials", "0"], ["--nope"], ["--seed", "x"], ["--budget"]]
)
def test_options_that_do_not_parse(search_call, arguments):
    answer = search_call("run", *arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.stderr
    assert arguments[0] in answer.stderr


def test_the_reachable_range_is_that_of_inspect(search_call, tiny, tmp_path):
    report = json.loads(search_call("inspect", "--task", tiny("mlp"), "--json").stdout)
    low, high = map(int, report["reachable"]["size_bytes"])
    answer = search_call("run", "--task", tiny("mlp"), "--budget", f"{low - 1}", "--out", tmp_path)
    assert f"{low} B to" in complaint(answer, 2)
    inspected = search_call("inspect", "--task", tiny("mlp"), "--budget", f"{low - 1}B")
    assert "the reachable range is" in complaint(inspected, 2)
    assert high > low


def test_a_folder_that_holds_a_run_is_left_alone(search_call, run_folder, tiny):
    before = snapshot(run_folder)
    answer = search_call("run", "--task", tiny("mlp"), "--out", run_folder)
    assert "--resume" in complaint(answer, 2)
    assert snapshot(run_folder) == before


@pytest.mark.slow
def test_resuming_needs_a_run_of_the_same_model_and_data(search_call, tiny, tmp_path):
    folder = tmp_path / "run"
    task = tmp_path / "task.py"
    source = Path(tiny("cnn").rpartition(":")[0]).read_text()
    task.write_text(source + "\n\nmake_task = cnn\n")
    started = search_call(
        "run", "--task", f"{task}:make_task", "--trials", 3, "--strategy", "uniform",
        "--out", folder,
    )  # fmt: skip
    assert started.code == 0, started.stderr
    before = snapshot(folder)
    for function, what in (("cnn_other_weights", "model"), ("cnn_other_data", "validation")):
        task.write_text(source + f"\n\nmake_task = {function}\n")
        answer = search_call("run", "--resume", folder)
        assert f"holds a run of another {what}" in complaint(answer, 2)
    assert snapshot(folder) == before


def test_folders_that_hold_no_run(search_call, tmp_path):
    for command in (
        ["run", "--resume"],
        ["show"],
        ["report"],
        ["export", "--best", "1kB", "-o", "x"],
    ):
        assert "holds no run" in complaint(search_call(*command, tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(search_call, run_folder, tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "run", Path("/proc/nothing/run")):
        answer = search_call("run", "--task", tiny("mlp"), "--trials", 3, "--out", out)
        assert "cannot be written" in complaint(answer, 4) or "cannot write" in answer.stderr
        exported = search_call("export", run_folder, "--best", "1kB", "--out", out / "x")
        assert f"cannot read or write {out.parent}" in complaint(exported, 4)
    assert "is a file" in complaint(
        search_call("run", "--task", tiny("mlp"), "--out", tmp_path / "file"), 2
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_packed_files_that_are_not_what_they_should_be(search_call, run_folder, tiny, tmp_path):
    packed = next((run_folder / "packed").iterdir())
    content = packed.read_bytes()
    path = tmp_path / "x.safetensors"
    for damaged in (
        content[:-1], content[:50], b"", b"hello", content + b"\0",
        content[:100] + bytes([content[100] ^ 4]) + content[101:],
        content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    ):  # fmt: skip
        path.write_bytes(damaged)
        assert "x.safetensors" in complaint(search_call("verify", path), 5)
    assert "no file" in complaint(search_call("verify", tmp_path / "absent"), 2)
    path.write_bytes(content)
    assert "another network" in complaint(search_call("verify", path, "--task", tiny("cnn")), 5)
    (tmp_path / "x.vectors.safetensors").write_bytes(b"not vectors")
    assert "x.vectors.safetensors" in complaint(search_call("verify", path), 5)


def test_a_file_of_other_weights_fails_against_its_run(search_call, run_folder, tmp_path):
    from quant_ops.packed import PackedModel

    paths = sorted((run_folder / "packed").iterdir())
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for out, path in ((first, paths[0]), (second, paths[1])):
        trial = path.stem
        assert search_call("export", run_folder, "--trial", trial, "--out", out).code == 0
    shutil.copyfile(tmp_path / "a.vectors.safetensors", tmp_path / "b.vectors.safetensors")
    assert "does not compute" in complaint(search_call("verify", second), 5)
    (tmp_path / "b.vectors.safetensors").unlink()
    assert PackedModel.load(second).digest != PackedModel.load(first).digest


def test_a_damaged_packed_file_in_a_run_is_not_exported(search_call, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    packed = sorted((copy / "packed").iterdir())[0]
    packed.write_bytes(packed.read_bytes()[:-3])
    answer = search_call("export", copy, "--trial", packed.stem, "--out", tmp_path / "x")
    complaint(answer, 5)
    assert not (tmp_path / "x").exists()


def test_damaged_json_in_a_run_is_said(search_call, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (copy / "front.json").write_text('{"format": "bitfront-front", "version": 1')
    assert "cannot read the front" in complaint(search_call("show", copy), 5)
    (copy / "config.json").write_text("{")
    assert "not readable JSON" in complaint(search_call("show", copy), 2)
    (copy / "config.json").write_text("[]")
    assert "not a run" in complaint(search_call("show", copy), 2)


def test_nothing_that_meets_the_budget_ends_with_three(search_call, tiny, tmp_path):
    answer = search_call(
        "run", "--task", tiny("mlp"), "--budget", "440B", "--bits", "1,8", "--trials", 1,
        "--strategy", "uniform", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "meets every budget" in complaint(answer, 3)
    assert str(tmp_path / "run") in answer.stderr
    resumed = search_call("run", "--resume", tmp_path / "run", "--trials", 2)
    assert resumed.code == 0, resumed.stderr


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many kilobytes."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk{kilobytes}"
        folder.mkdir()
        options = f"size={kilobytes}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [16, 64, 160, 1000])
def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(
    search_call, small_disk, tiny, tmp_path, kilobytes
):
    disk = small_disk(kilobytes)
    arguments = ["--task", tiny("mlp"), "--trials", 30, "--budget", "1kB"]
    answer = search_call("run", *arguments, "--out", disk / "run")
    said = complaint(answer, 4)
    assert "No space left on device" in said
    assert not list(disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    resumed = search_call("run", "--resume", disk / "run", "--json")
    assert resumed.code == 0, resumed.stderr
    whole = search_call("run", *arguments, "--out", tmp_path / "whole", "--json")
    keep = ("trial", "loss", "size_bytes", "candidate")
    fronts = [
        [{key: p[key] for key in keep} for p in json.loads(answer.stdout)["points"]]
        for answer in (resumed, whole)
    ]
    assert fronts[0] == fronts[1]


@pytest.mark.slow
def test_an_export_to_a_full_disk_leaves_nothing_half_written(search_call, run_folder, small_disk):
    disk = small_disk(8)
    (disk / "filler").write_bytes(bytes(4096 + 4096 - 512))
    assert os.statvfs(disk).f_bfree == 0
    answer = search_call("export", run_folder, "--best", "1kB", "--out", disk / "x.safetensors")
    assert "No space left on device" in complaint(answer, 4)
    assert [p.name for p in disk.iterdir()] == ["filler"]


def test_an_unknown_strategy_is_refused_before_the_task_is_loaded(search_call, tmp_path):
    task = f"{BAD_TASKS}:no_such_function"  # loading it would complain of that
    answer = search_call("run", "--task", task, "--strategy", "ajpk", "--out", tmp_path / "run")
    assert "there is no strategy 'ajpk'; choose from auto, uniform" in complaint(answer, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fpga", "virtex2"), "no fitted model of the FPGA family 'virtex2'; known are"),
        (("--budget", "lut=20k"), "add --activation-bits 8"),
        (("--budget", "lut=20", "--activation-bits", 8), "no candidate fits 20 LUT of lut"),
        (("--budget", "lut=twenty"), "not a positive number"),
    ],
)
def test_an_fpga_that_cannot_be_priced(search_call, tiny, tmp_path, options, message):
    answer = search_call("run", "--task", tiny("mlp"), *options, "--out", tmp_path / "run")
    assert message in complaint(answer, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tool_is_named_with_how_to_install_it(search_call, run_folder, monkeypatch):
    monkeypatch.setattr("search.fpga.require_tools", _without_yosys)
    answer = search_call("fpga", run_folder)
    assert "apt-get install yosys" in complaint(answer, 4)


def _without_yosys():
    from cost_models.fpga import synthesis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis.shutil, "which", lambda name: None)
        synthesis.require_tools()
