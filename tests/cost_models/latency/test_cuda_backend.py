"""What can be checked without a GPU: rules, constraints, values, the table; and a device if any."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import torch
from torch import Tensor, nn

from cost_models.latency import cuda_backend, cuda_device
from cost_models.latency.backend import Runner, find_backend
from cost_models.latency.cuda_backend import Captured, Cuda
from cost_models.latency.cuda_device import CudaDevice, as_matmul, padded, rules_for
from cost_models.latency.cuda_kernels import build
from cost_models.latency.grid import task_walks
from cost_models.latency.lowering import calls_of
from cost_models.latency.measure import Plan, measure_table
from cost_models.latency.model import Latency
from cost_models.latency.table import LatencyTable, load_table
from cost_models.latency.work import Work
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.errors import EnvironmentFault, UsageError
from quant_ops.removal import NOTHING

SCHEMA = Path(__file__).parents[3] / "cost_models" / "latency_table.schema.json"
PLAN = Plan(rounds=2, passes=1)
CONV = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1,))
POINTWISE = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), (1,))
L4 = CudaDevice("NVIDIA L4", (8, 9), 58, 24 * 10**9, "550.54", "12.8", "0.18.0", place="cpu")
OLD = replace(L4, name="Tesla V100", capability=(7, 0), torchao="")


def kernel_on(device, operator, weight_bits, activation_bits):
    table = LatencyTable("", {}, "", "", "cuda", "us", rules_for(device), ())
    return table.kernel_for(operator, weight_bits, activation_bits)


@pytest.mark.parametrize(
    ("operator", "weight_bits", "activation_bits", "kernel"),
    [
        ("linear", 4, 3, "fp8"),
        ("linear", 5, 4, "int8"),
        ("linear", 4, 5, "int8"),
        ("conv", 4, 4, "int8"),
        ("linear", 3, 32, "weight4"),
        ("linear", 5, 32, "weight8"),
        ("conv", 4, 32, "float16"),
        ("linear", 32, 32, "float32"),
        ("conv", 32, 32, "float32"),
        ("add", 0, 4, "int8"),
        ("mean", 0, 32, "float32"),
        ("quantize", 0, 8, "int8"),
    ],
)
def test_widths_run_on_the_narrowest_kernel_that_holds_them(
    operator, weight_bits, activation_bits, kernel
):
    assert kernel_on(L4, operator, weight_bits, activation_bits) == kernel


@pytest.mark.parametrize(
    ("capability", "torchao", "four_four", "four_float", "eight_float"),
    [
        ((9, 0), "0.18.0", "fp8", "weight4", "weight8"),
        ((8, 6), "0.18.0", "int8", "weight4", "weight8"),
        ((7, 5), "0.18.0", "int8", "weight8", "weight8"),
        ((8, 9), "", "fp8", "float16", "float16"),
        ((7, 0), "", "int8", "float16", "float16"),
    ],
)
def test_capability_and_packages_decide_which_kernels_there_are(
    capability, torchao, four_four, four_float, eight_float
):
    device = replace(L4, capability=capability, torchao=torchao)
    asked = ((4, 4), (4, 32), (8, 32))
    assert [kernel_on(device, "linear", *a) for a in asked] == [four_four, four_float, eight_float]


def test_the_rules_say_what_is_missing():
    def notes(device, kernel):
        return [r.note for r in rules_for(device) if r.kernel == kernel]

    assert "torchao is not installed" in notes(replace(L4, torchao=""), "float16")[0]
    assert "torch._int_mm" in notes(L4, "int8")[0]
    assert "no integer kernel" in notes(OLD, "int8")[0]


@pytest.mark.parametrize(
    ("kernel", "shape", "wanted"),
    [
        ("int8", (1, 100, 10), (32, 104, 16)),
        ("int8", (33, 8, 8), (40, 8, 8)),
        ("fp8", (1, 100, 10), (1, 112, 16)),
        ("weight4", (1, 100, 10), (1, 128, 10)),
        ("weight8", (1, 100, 10), (1, 100, 10)),
    ],
)
def test_sizes_are_padded_to_what_a_kernel_takes(kernel, shape, wanted):
    assert padded(kernel, shape) == wanted


def test_only_dense_one_by_one_convolutions_are_matrix_products():
    assert as_matmul(Work("conv", (16, 24, 5, 7), (*POINTWISE, (0,)))) == (35, 16, 24)
    strided = (POINTWISE[0], (2, 2), *POINTWISE[2:])
    for attributes in (CONV, strided, (*POINTWISE[:4], (0,))):
        assert as_matmul(Work("conv", (16, 16, 5, 7), (*attributes, (0,)))) is None


CALLS = [
    (Work("conv", (3, 32, 8, 8), (*CONV, (0,))), "float32", (1, 32, 8, 8)),
    (Work("conv", (16, 32, 8, 8), (*CONV, (1,))), "float16", (1, 32, 8, 8)),
    (Work("conv", (16, 32, 8, 8), (*CONV, (1,))), "int8", (1, 32, 8, 8)),
    (Work("conv", (16, 16, 8, 8), (*CONV[:4], (0,), (0,))), "int8", (1, 16, 8, 8)),
    (Work("conv", (17, 30, 5, 7), (*POINTWISE, (1,))), "int8", (1, 30, 5, 7)),
    (Work("conv", (17, 30, 5, 7), (*POINTWISE, (0,))), "float16", (1, 30, 5, 7)),
    (Work("conv", (4, 8, 5, 5), (*CONV[:2], (0, 0, 1, 1), *CONV[3:], (0,))), "float32",
     (1, 8, 4, 4)),
    (Work("linear", (20, 7, 3)), "float32", (3, 7)),
    (Work("linear", (20, 7, 3)), "float16", (3, 7)),
    (Work("linear", (20, 7, 3)), "int8", (3, 7)),
    (Work("linear", (20, 7, 3)), "fp8", (3, 7)),
    (Work("mean", (17, 5, 5)), "int8", (1, 17, 1, 1)),
    (Work("max_pool", (8, 6, 6), ((2, 2), (2, 2), (0, 0, 0, 0))), "int8", (1, 8, 3, 3)),
    (Work("average_pool", (8, 6, 6), ((2, 2), (2, 2), (0, 0, 0, 0))), "float32", (1, 8, 3, 3)),
    (Work("copy", (100, 7)), "int8", (15, 7)),
    (Work("layout", (64,)), "float32", (1, 16, 4, 1)),
    (Work("add", (5,)), "int8", (5,)),
    (Work("add", (5,)), "float32", (5,)),
    (Work("quantize", (5,)), "int8", (5,)),
]  # fmt: skip


@pytest.mark.parametrize("device", [L4, OLD], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("work", "kernel", "shape"), CALLS, ids=[f"{w.describe()} {k}" for w, k, _ in CALLS]
)
def test_calls_give_what_the_next_call_reads(device, work, kernel, shape):
    result = build(work, kernel, device)()
    assert tuple(result.shape) == shape
    codes = kernel in ("int8", "fp8")
    assert result.dtype == (torch.int8 if codes else torch.float32)


def test_a_dequantized_value_is_float():
    assert build(Work("dequantize", (5,)), "int8", L4)().dtype == torch.float32


def test_eight_bit_floats_hold_four_bit_codes_with_and_without_an_offset_of_half_a_step():
    for codes in (torch.arange(-8.0, 16), torch.arange(-8.0, 8) + 0.5):
        assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)


class Packed(Tensor):
    """Stands for a quantized weight."""


@pytest.fixture
def torchao(monkeypatch):
    """A stand-in that wraps weights, or leaves them alone, and notes what it was asked for."""
    module = ModuleType("torchao.quantization")
    module.asked, module.works = [], True

    def quantize(layer, config):
        module.asked.append((*layer.weight.shape, config))
        if module.works:
            layer.weight = nn.Parameter(layer.weight.as_subclass(Packed), requires_grad=False)

    module.quantize_ = quantize
    module.Int4WeightOnlyConfig = lambda **settings: ("int4", settings)
    module.Int8WeightOnlyConfig = lambda **settings: ("int8", settings)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    return module


def test_weights_alone_are_packed_by_torchao_in_whole_groups(torchao):
    work = Work("linear", (100, 7, 3))
    assert build(work, "weight4", L4)().shape == (3, 7)
    assert build(work, "weight8", L4)().shape == (3, 7)
    settings = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
    assert torchao.asked == [(7, 128, ("int4", settings)), (7, 100, ("int8", {}))]


def test_a_layer_that_torchao_leaves_alone_is_not_timed_as_packed(torchao):
    torchao.works = False
    with pytest.raises(EnvironmentFault, match=r"0\.18\.0 does not quantize .* kernel weight4"):
        build(Work("linear", (100, 7, 3)), "weight4", L4)


def test_the_real_torchao_packs_eight_bits():
    pytest.importorskip("torchao.quantization")
    result = build(Work("linear", (100, 7, 3)), "weight8", L4)()
    assert result.shape == (3, 7)
    assert result.dtype == torch.float32


def test_without_a_gpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EnvironmentFault, match="is built without CUDA; install a CUDA build"):
        find_backend("cuda")()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(EnvironmentFault, match="torch finds no GPU"):
        find_backend("cuda")()


def test_the_driver_is_read_from_its_own_file(tmp_path):
    path = tmp_path / "version"
    assert cuda_device.driver_version(path) == ""
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\nGCC\n")
    assert cuda_device.driver_version(path) == "550.54.15"


class OnCpu(Runner):
    """Runs the functions once, where a GPU would capture them; a run takes 5 us, a call 2 us."""

    def __init__(self, runs, pool):
        assert all(run() is not None for run in runs)
        self.time_us = 5.0 + 2.0 * len(runs)

    def time_once(self):
        return self.time_us


@pytest.fixture
def backend_of(monkeypatch):
    def make(device):
        monkeypatch.setattr(cuda_backend, "find_device", lambda: device)
        monkeypatch.setattr(cuda_backend, "Captured", OnCpu)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        return Cuda()

    return make


@pytest.fixture
def measured(graph, backend_of, torchao):
    backend = backend_of(L4)
    empty = LatencyTable("", {}, "", "", "cuda", "us", backend.rules, ())
    walks = task_walks(graph, empty.kernel_for, empty.weight_bytes)
    return measure_table(backend, walks, name="l4", plan=PLAN)


def candidate(graph, bits, edge_bits=None):
    edges = [e.name for e in activation_edges(graph) if e.kind not in ("output", "partial")]
    return Candidate.of(
        {layer.name: bits for layer in graph.searchable_layers},
        dict.fromkeys(edges, edge_bits) if edge_bits else {},
    )


def test_a_measured_table_fits_the_schema_and_prices_every_width(measured, graph, tmp_path):
    jsonschema.validate(json.loads(measured.to_text()), json.loads(SCHEMA.read_text()))
    (tmp_path / "l4.json").write_text(measured.to_text())
    table = load_table(tmp_path / "l4.json")
    assert table == measured
    assert (table.backend, table.call_overhead) == ("cuda", 5.0)
    assert table.libraries == {"torch": torch.__version__, "torchao": "0.18.0"}
    kernels = {e.kernel for e in table.entries}
    assert kernels == {"fp8", "int8", "weight4", "weight8", "float16", "float32"}
    for bits in (1, 2, 4, 5, 8):
        for edge_bits in (None, 4, 8):
            assert Latency(table).cost(graph, candidate(graph, bits, edge_bits)) > 0


def test_a_whole_network_is_all_of_its_calls(graph, measured, backend_of):
    calls = calls_of(graph, candidate(graph, 4, 4), NOTHING, measured.kernel_for)
    n_calls = sum(bool(c.kernel) for c in calls)
    assert {"fp8", "int8"} <= {c.kernel for c in calls}
    assert backend_of(L4).network(graph, calls).time_once() == 5.0 + 2.0 * n_calls


def test_without_torchao_the_kernels_are_left_out_and_that_is_said(graph, backend_of, caplog):
    backend = backend_of(OLD)
    empty = LatencyTable("", {}, "", "", "cuda", "us", backend.rules, ())
    walks = task_walks(graph, empty.kernel_for, empty.weight_bytes, pruned=False)
    table = measure_table(backend, walks, name="v100", plan=PLAN)
    assert {e.kernel for e in table.entries} == {"int8", "float16", "float32"}
    assert "torchao" not in table.libraries
    assert "kernels for weights alone are left out of the table" in caplog.text


def test_a_table_of_another_gpu_is_not_gone_on_with(graph, measured, backend_of):
    slice_of_it = replace(L4, multiprocessors=14)
    with pytest.raises(UsageError, match="was made with another device"):
        measure_table(backend_of(slice_of_it), [], name="l4", plan=PLAN, known=measured)


def test_the_fingerprint_is_of_the_device_its_driver_and_cuda(backend_of):
    fingerprint = backend_of(L4).device()["fingerprint"]
    assert fingerprint == backend_of(replace(L4, torchao="")).device()["fingerprint"]
    for change in ({"capability": (9, 0)}, {"driver": "570.1"}, {"cuda": "13.0"}):
        assert backend_of(replace(L4, **change)).device()["fingerprint"] != fingerprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_of_this_device_can_be_timed():
    backend = Cuda()
    assert isinstance(backend.empty(3), Captured)
    kernels = {rule.kernel for rule in backend.rules}
    linears = [(Work("linear", (100, 7, 3)), k) for k in ("weight4", "weight8", "fp8")]
    calls = [*((w, k) for w, k, _ in CALLS), *linears]
    for work, kernel in calls:
        if kernel in kernels:
            assert backend.call(work, kernel).time_once() > 0, (work.describe(), kernel)
