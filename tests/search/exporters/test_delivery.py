"""What is handed over was run and compared; what is damaged or hostile is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_ops.errors import VerificationError
from search.exporters.onnx_graph.reading import require_sound


@pytest.fixture(scope="module")
def run_folder(search_command, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cnn"
    done = search_command("run", "--task", tiny("cnn"), "--trials", 6, "--threads", 1, "--out", out)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=["onnx", "torch"])
def exported(request, search_command, run_folder, tmp_path_factory):
    """A weights-only point, exported: its folder and what was said."""
    out = tmp_path_factory.mktemp("exports") / request.param
    done = search_command(
        "export", run_folder, "--best", "2kB", "--to", request.param, "--out", out, "--json"
    )
    assert done.code == 0, done.stderr
    return out, json.loads(done.stdout)


def test_an_export_says_what_it_is_and_verifies(exported, search_call, tiny):
    folder, told = exported
    assert told["largest_difference"] <= 1e-4
    assert "time_per_inference" in told
    assert "on validation" in told["metric"]
    manifest = json.loads((folder / "artefact.json").read_text())
    assert manifest["assignment"]["layers"]
    again = search_call("verify", folder, "--task", tiny("cnn"), "--json")
    assert again.code == 0, again.stderr
    facts = json.loads(again.stdout)
    assert facts["metric"] == told["metric"]
    assert facts["test_vectors"].startswith("32 run")


def test_the_printed_snippet_runs_without_this_project(exported, tmp_path):
    _, told = exported
    code = f"{told['load']}\nimport sys\nassert len(outputs)\n"
    code += "assert not {'search', 'quant_ops'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_damaged_artefacts_are_refused_in_one_sentence(exported, search_call, tmp_path):
    folder, _ = exported
    model = next(p.name for p in folder.iterdir() if p.stem == "model")

    def refused(change) -> str:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        change(copy)
        answer = search_call("verify", copy)
        shutil.rmtree(copy)
        assert answer.code == 5, answer.stderr
        assert "Traceback" not in answer.stderr
        return answer.stderr

    def rewritten(copy: Path, **changes: object) -> None:
        manifest = json.loads((copy / "artefact.json").read_text())
        (copy / "artefact.json").write_text(json.dumps({**manifest, **changes}))

    cut = lambda copy: (copy / model).write_bytes((copy / model).read_bytes()[:-9])  # noqa: E731
    assert "is not the file that was exported" in refused(cut)
    assert "lacks the file" in refused(lambda copy: (copy / model).unlink())
    assert "cannot be read" in refused(lambda copy: (copy / "artefact.json").unlink())
    assert "not a manifest" in refused(lambda copy: (copy / "artefact.json").write_text("{}"))
    outside = {"../x": {"bytes": 1, "blake2b": ""}}
    assert "outside the artefact" in refused(lambda copy: rewritten(copy, files=outside))


def test_an_export_that_exists_is_not_overwritten_unasked(exported, search_call, run_folder):
    folder, told = exported
    arguments = ["export", run_folder, "--best", "2kB", "--to", told["target"], "--out", folder]
    assert "--force" in search_call(*arguments).stderr
    assert search_call(*arguments, "--codec", "entropy", "--force").code == 2


def test_an_arithmetic_that_cannot_be_had_is_refused(search_call, run_folder, tmp_path):
    export = ["export", run_folder, "--best", "2kB", "--out", tmp_path / "x", "--arithmetic"]
    floats = search_call(*export, "exact", "--to", "onnx")
    assert floats.code == 2
    assert "activations are not quantized" in floats.stderr
    assert "--activation-bits 8" in floats.stderr
    assert "--to onnx" in search_call(*export, "exact", "--to", "torch").stderr
    assert "runtime or exact" in search_call(*export, "other", "--to", "onnx").stderr
    assert not (tmp_path / "x").exists()


def model_of(*nodes: onnx.NodeProto, **tensors: np.ndarray) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)


def external() -> onnx.ModelProto:
    model = model_of(helper.make_node("Add", ["x", "a"], ["y"]), a=np.zeros(1, np.float32))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return model


def cyclic() -> onnx.ModelProto:
    return model_of(
        helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["x", "a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    )  # fmt: skip


def lying() -> onnx.ModelProto:
    model = model_of(helper.make_node("Add", ["x", "a"], ["y"]), a=np.zeros(4, np.float32))
    model.graph.initializer[0].dims[0] = 10**6
    return model


HOSTILE = {
    "data outside the file": external,
    "a cycle": cyclic,
    "a size that lies": lying,
    "a shape that fills all memory": lambda: model_of(
        helper.make_node("Expand", ["x", "s"], ["y"]), s=np.array([2**20, 2**20])
    ),
    "a foreign operator": lambda: model_of(
        helper.make_node("Evil", ["x"], ["y"], domain="com.elsewhere")
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_onnx_files_are_refused(case):
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        require_sound(HOSTILE[case]().SerializeToString(), Path("model.onnx"))


@pytest.mark.parametrize("seed", range(20))
def test_flipped_and_missing_bytes_never_crash_the_reader(seed):
    content = bytearray(external().SerializeToString())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(content), 4):
        content[at] ^= 1 << int(rng.integers(8))
    content = content[: int(rng.integers(1, len(content) + 1))]
    with pytest.raises(VerificationError):
        require_sound(bytes(content), Path("model.onnx"))


def test_a_target_says_what_it_cannot_run_before_the_search(search_call, tiny, tmp_path):
    seen = search_call("inspect", "--task", tiny("zoo"), "--target", "c", "--json")
    assert seen.code == 0, seen.stderr
    refusals = json.loads(seen.stdout)["target_refuses"]
    assert refusals
    assert all(";" in text and ":" in text for text in refusals)
    out = tmp_path / "run"
    run = search_call("run", "--task", tiny("zoo"), "--target", "c", "--trials", 3, "--out", out)
    assert run.code == 2
    assert "target 'c' cannot run" in run.stderr
    fine = search_call("inspect", "--task", tiny("cnn"), "--target", "onnx", "--json")
    assert json.loads(fine.stdout)["target_refuses"] == []
