"""Latency tables in a run: budgets, bad input, the published optima, whole networks checked."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cost_models.latency import cuda_backend
from cost_models.latency.backend import Runner
from cost_models.latency.cuda_device import CudaDevice
from cost_models.latency.lowering import calls_of
from cost_models.latency.table import LatencyTable, load_table
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.errors import BudgetError, UsageError
from quant_ops.removal import NOTHING
from search.allocation import allocate, total
from search.capture import trace
from search.cheapest import cheapest
from search.choices import build_space
from search.config import RunConfig
from search.latency import SHIPPED, find_table, latency_model, other_device
from search.profiling import LatencyCheck, LatencySummary

DATA = Path(__file__).parent / "data" / "hawq_resnet18.json"
TIES = ((4, 6), (9, 11), (14, 16))  # the two inputs of one residual addition
OPTIMA = [
    (0.25, -0.847289, 3.6147, "8884848444444444444"),
    (0.50, -1.105039, 4.2201, "8888848848884484844"),
    (0.75, -1.227748, 4.7063, "8888888848888484884"),
]


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride)) if stride > 1 else None

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Body(nn.Module):
    """ResNet-18 for 224x224 images between its first convolution and its classifier."""

    def __init__(self):
        super().__init__()
        n_in = 64
        for number, n_out in enumerate((64, 128, 256, 512), 1):
            stage = nn.Sequential(
                Block(n_in, n_out, 1 if number == 1 else 2), Block(n_out, n_out, 1)
            )
            setattr(self, f"layer{number}", stage)
            n_in = n_out

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


@pytest.fixture(scope="module")
def body():
    return trace(Body().eval(), (torch.randn(2, 64, 56, 56),)).graph


def layer_times(graph, table, bits):
    """Layer name to time in the network with all widths at `bits`."""
    edges = {e.name: bits for e in activation_edges(graph) if e.kind not in ("output", "partial")}
    candidate = Candidate.of({layer.name: bits for layer in graph.searchable_layers}, edges)
    calls = calls_of(graph, candidate, NOTHING, table.kernel_for)
    return {c.layer: table.time(c.work, c.kernel, c.layer) for c in calls if c.layer}


@pytest.mark.parametrize(("ratio", "objective", "latency", "bit_widths"), OPTIMA)
def test_latency_limited_optima_of_hawq_v3_follow_from_the_shipped_table(
    body, ratio, objective, latency, bit_widths
):
    table = load_table(find_table("t4-hawq-v3-resnet18"))
    narrow, wide = (layer_times(body, table, bits) for bits in (4, 8))
    names = list(narrow)  # in execution order, as the published arrays
    data = json.loads(DATA.read_text())
    change = np.array(data["Hutchinson_trace"]) * (
        np.array(data["delta_weights_8bit_square"]) - np.array(data["delta_weights_4bit_square"])
    )
    late = {second: first for first, second in TIES}
    groups = [[i, *(b for a, b in TIES if a == i)] for i in range(19) if i not in late]
    losses = [np.array([0.0, change[group].sum()]) for group in groups]
    costs = [
        np.array([sum(times[names[i]] for i in group) for times in (narrow, wide)])
        for group in groups
    ]
    low, high = sum(narrow.values()), sum(wide.values())
    choice = allocate(losses, {"latency_ms": costs}, {"latency_ms": low + ratio * (high - low)})
    assert choice is not None
    assert total(losses, choice) == pytest.approx(objective, abs=1e-6)
    assert total(costs, choice) == pytest.approx(latency, abs=5e-5)
    at = {layer: pick for group, pick in zip(groups, choice, strict=True) for layer in group}
    assert "".join("48"[at[i]] for i in range(19)) == bit_widths


def test_four_bits_save_little_in_thin_one_by_one_kernels():
    table = load_table(find_table("t4-hawq-v3-resnet50"))
    times = {(e.layer, e.kernel): e.time for e in table.entries}
    ratio = {n: times[n, "int8"] / times[n, "int4"] for n, kernel in times if kernel == "int8"}
    assert ratio["layer1.0.conv1"] < 1.05 < 1.5 < ratio["layer4.0.conv2"]


@pytest.mark.parametrize("name", ["t4-hawq-v3-resnet18", "t4-hawq-v3-resnet50", "t4-tvm-batch8"])
def test_the_published_tables_can_be_made_again(name):
    path = Path(__file__).parents[2] / "studies" / "t4_tables.py"
    spec = importlib.util.spec_from_file_location("t4_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shipped = load_table(SHIPPED / f"{name}.json")
    if name == "t4-tvm-batch8":
        assert module.tuned_table() == shipped
    elif name == "t4-hawq-v3-resnet18":
        inputs = json.loads(DATA.read_text())
        assert module.planner_table("resnet18", module.resnet18_layers(), inputs) == shipped
    else:
        works = [work for _, work in module.resnet50_layers()]
        assert works == [e.work for e in shipped.entries if e.kernel == "int4"]


def test_a_latency_budget_needs_a_table():
    with pytest.raises(BudgetError, match="needs --latency-table"):
        latency_model(RunConfig(budgets=("latency=2ms",)))
    assert latency_model(RunConfig(budgets=("2MB",))) is None


def test_a_table_is_found_by_file_and_by_name_the_users_own_first(tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_TABLES", str(tmp_path))
    assert find_table("t4-tvm-batch8").parent == SHIPPED
    own = tmp_path / "t4-tvm-batch8.json"
    own.write_text((SHIPPED / "t4-tvm-batch8.json").read_text())
    assert find_table("t4-tvm-batch8") == own
    assert find_table(str(own)) == own
    with pytest.raises(UsageError, match=r"neither a file .* nor one of the listed ones: .*t4-"):
        find_table("nowhere")


def test_a_table_of_another_device_names_both():
    pytest.importorskip("onnxruntime")
    table = LatencyTable(
        "board", {"name": "a board", "fingerprint": "0"}, "", "2026-01-01", "onnxruntime", "us",
        (), (),
    )  # fmt: skip
    note = other_device(table)
    assert "'board' was measured on a board, this machine is " in note
    assert other_device(replace(table, backend="tvm")) == ""


def test_the_cheapest_candidate_need_not_be_the_narrowest(body):
    space = build_space(body, RunConfig(bits=(2, 4, 8)))
    slow = {2.0: 3.0, 4.0: 1.0, 8.0: 2.0}

    def cost(candidate):
        return sum(slow[quant.uniform] for _, quant in candidate.layers)

    assert cheapest(space, cost) == space.uniform(4)
    assert cost(cheapest(space, cost, limit=50.0)) <= 50.0


def test_a_summary_compares_ranks_with_those_of_a_repetition():
    checks = [
        LatencyCheck("t", "d", p, m, 0.0, (m, m + 0.1 * (m == 2)))
        for p, m in ((1.1, 1.0), (2.2, 2.0), (2.9, 3.0))
    ]
    summary = LatencySummary.of(checks)
    assert (summary.rank_correlation, summary.repeatability) == (1.0, 1.0)
    assert summary.median_error == pytest.approx(0.1)
    assert "median error 10.0 %" in summary.line()
    assert LatencySummary.of(checks[:2]).rank_correlation is None


def test_tables_are_listed(search_call, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFRONT_TABLES", str(tmp_path))
    (tmp_path / "broken.json").write_text("{}")
    answer = search_call("tables")
    assert answer.code == 0
    assert "NVIDIA T4" in answer.stdout
    assert "no unit: use ratios only" in answer.stdout
    assert "broken: cannot be read" in answer.stdout
    rows = {row["name"]: row for row in json.loads(search_call("tables", "--json").stdout)}
    assert rows["t4-tvm-batch8"]["shapes"] == 12
    assert rows["t4-tvm-batch8"]["batch"] == 8


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("profile", "--task", "digits"), "needs --out FILE", 2),
        (("profile", "--out", "t.json"), "the shapes of --task T, or a grid", 2),
        (("profile", "--backend", "abacus", "--out", "t.json"), "no backend 'abacus'", 2),
        (("run", "--latency-table", "nowhere"), "there is no latency table 'nowhere'", 2),
        (("run", "--budget", "latency=2ms"), "needs --latency-table", 2),
        (("run", "--budget", "latency=soon"), "is not a time; write it as 2ms", 2),
        (("profile", "--check", "nowhere"), "holds no run", 2),
        (
            ("profile", "--backend", "cuda", "--task", "digits", "--out", "t.json"),
            "needs an NVIDIA GPU and a CUDA build of torch",
            4,
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(search_call, arguments, message, code, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = search_call(*arguments)
    assert answer.code == code
    assert message in answer.stderr


@pytest.mark.slow
def test_a_machine_is_profiled_searched_for_and_checked(search_call, tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    table, run = tmp_path / "cpu.json", tmp_path / "run"
    few = ("--rounds", 2, "--passes", 5)
    answer = search_call("profile", "--task", tiny("mlp"), "--out", table, *few)
    assert answer.code == 0, answer.stderr
    assert "weight4" in answer.stdout
    search = ("run", "--task", tiny("mlp"), "--latency-table", table, "--out", run)
    unreachable = search_call(*search, "--budget", "latency=0.01us")
    assert unreachable.code == 2
    assert "no candidate fits 0.01 us of latency_ms: the reachable range is" in unreachable.stderr
    budgets = ("--budget", "2kB", "--budget", "latency=10s", "--budget", "ram=2kB")
    answer = search_call(*search, *budgets, "--trials", 20)
    assert answer.code == 0, answer.stderr
    assert "latency" in answer.stdout
    answer = search_call("profile", "--check", run, "--json")
    assert answer.code == 0, answer.stderr
    checked = json.loads(answer.stdout)
    assert all(n["measured_ms"] > 0 and n["predicted_ms"] > 0 for n in checked["networks"])
    shown = search_call("show", run).stdout
    assert "whole networks, timed" in shown
    assert json.loads(search_call("report", run, "--json").stdout)["latency"] == checked


class Made(Runner):
    """A call that takes a made-up time, so that the whole grid is measured in a moment."""

    def __init__(self, time_us: float) -> None:
        self._time_us = time_us

    def time_once(self) -> float:
        return self._time_us


@pytest.mark.slow
def test_one_grid_serves_networks_that_it_was_not_made_for(
    search_call, tiny, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    from cost_models.latency.onnxruntime_backend import OnnxRuntime

    monkeypatch.setattr(
        OnnxRuntime, "call", lambda self, work, kernel: Made(4 + 1e-4 * np.prod(work.dims))
    )
    monkeypatch.setattr(OnnxRuntime, "empty", lambda self, n_calls: Made(3))
    table = tmp_path / "grid.json"
    answer = search_call("profile", "--shapes", "--out", table, "--rounds", 1, "--passes", 1)
    assert answer.code == 0, answer.stderr
    entries = load_table(table).entries
    assert len(entries) > 2000
    assert {entry.work.operator for entry in entries} >= {"linear", "conv", "add", "max_pool"}
    again = search_call("profile", "--shapes", "--out", table, "--rounds", 1, "--passes", 1)
    assert again.code == 0, again.stderr
    assert load_table(table).entries == entries  # nothing is measured twice
    for name in ("mlp", "cnn"):
        budgets = ("--budget", "latency=10s", "--latency-table", table)
        run = ("run", "--task", tiny(name), *budgets, "--trials", 4, "--out", tmp_path / name)
        answer = search_call(*run)
        assert answer.code == 0, answer.stderr
        points = json.loads((tmp_path / name / "front.json").read_text())["points"]
        assert all(point["costs"]["latency_ms"] > 0 for point in points)


@pytest.mark.slow
def test_a_table_of_a_gpu_is_listed_and_searched_where_there_is_none(search_call, tiny, tmp_path):
    device = CudaDevice("NVIDIA L4", (8, 9), 58, 24 * 10**9, "550.54", "12.8", "", place="cpu")
    table = tmp_path / "l4.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "find_device", lambda: device)
        patch.setattr(cuda_backend, "Captured", lambda runs, pool: Made(5.0 + 2.0 * len(runs)))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        few = ("--rounds", 1, "--passes", 1)
        answer = search_call(
            "profile", "--backend", "cuda", "--task", tiny("mlp"), "--out", table, *few
        )
    assert answer.code == 0, answer.stderr
    assert "fp8" in answer.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFRONT_TABLES", str(tmp_path))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        listed = {row["name"]: row for row in json.loads(search_call("tables", "--json").stdout)}
        assert listed["l4"]["backend"] == "cuda"
        assert listed["l4"]["kernels"]["linear"][:2] == ["fp8 (W4 A4)", "int8 (W8 A8)"]
        budgets = ("--budget", "latency=10s", "--activation-bits", "4,8", "--trials", 8)
        run = ("run", "--task", tiny("mlp"), "--latency-table", "l4", *budgets)
        answer = search_call(*run, "--out", tmp_path / "run")
        assert answer.code == 0, answer.stderr
        points = json.loads((tmp_path / "run" / "front.json").read_text())["points"]
        assert all(point["costs"]["latency_ms"] > 0 for point in points)
        refused = search_call("profile", "--check", tmp_path / "run", "--backend", "cuda")
        assert refused.code == 4
        assert "needs an NVIDIA GPU" in refused.stderr
