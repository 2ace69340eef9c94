"""The kernels that really run, by the runtime's own account; no times are compared."""

import json

import pytest

pytest.importorskip("onnxruntime")

from cost_models.latency.lowering import calls_of, smaller_network
from cost_models.latency.onnx_timing import network
from cost_models.latency.onnxruntime_backend import OnnxRuntime, _profiled, _Session
from cost_models.latency.table import LatencyTable
from cost_models.latency.work import Work
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.removal import NOTHING

CONV = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1,))


@pytest.fixture(scope="module")
def table():
    return LatencyTable("", {}, "", "", "onnxruntime", "us", OnnxRuntime.rules, ())


def operators(content):
    return {op for op, _ in _profiled(content, 1).values()}


def built(graph, candidate, table):
    smaller, widths = smaller_network(graph, candidate)
    return network(smaller, calls_of(smaller, widths, NOTHING, table.kernel_for))


def test_integer_networks_run_integer_kernels_throughout(graph, table):
    edges = {e.name: 8 for e in activation_edges(graph) if e.kind not in ("output", "partial")}
    candidate = Candidate.of({layer.name: 4 for layer in graph.searchable_layers}, edges)
    found = operators(built(graph, candidate, table))
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QuantizeLinear"} <= found
    assert not found & {"Conv", "Gemm", "Add", "DequantizeLinear", "MatMul"}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_alone_have_a_kernel_in_linear_layers_only(graph, table, bits):
    candidate = Candidate.of({layer.name: bits for layer in graph.searchable_layers})
    found = operators(built(graph, candidate, table))
    assert {"Conv", "MatMulNBits"} <= found
    assert not found & {"Add", "DequantizeLinear", "Gemm", "QLinearConv"}


def test_half_a_network_on_integers_and_a_pruned_one_can_be_built(graph, table):
    first = next(e.name for e in activation_edges(graph) if e.kind == "input")
    half = Candidate.of({"one": 8}, {first: 8})
    assert {"QLinearConv", "Conv", "DequantizeLinear"} <= operators(built(graph, half, table))
    pruned = Candidate.of({"three": LayerQuant((0,) * 7 + (8,) * 17), "head": 4})
    session = _Session(built(graph, pruned, table), 1)
    assert session.time_once() > 0


@pytest.mark.parametrize(
    ("work", "kernel"),
    [
        (Work("conv", (16, 32, 8, 8), (*CONV, (1,))), "float32"),
        (Work("conv", (16, 32, 8, 8), (*CONV, (1,))), "int8"),
        (Work("conv", (16, 16, 8, 8), (*CONV[:4], (0,), (0,))), "float32"),
        (Work("conv", (1, 1, 8, 8), (*CONV, (0,))), "int8"),
        (Work("linear", (20, 7, 3)), "weight2"),
        (Work("linear", (1, 1, 1)), "weight8"),
        (Work("mean", (17, 5, 5)), "int8"),
        (Work("average_pool", (8, 6, 6), ((2, 2), (2, 2), (0, 0, 0, 0))), "int8"),
        (Work("copy", (100, 7)), "int8"),
        (Work("layout", (1,)), "float32"),
        (Work("layout", (300,)), "int8"),
        (Work("quantize", (5,)), "int8"),
        (Work("dequantize", (5,)), "int8"),
        (Work("add", (5,)), "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_every_kind_of_call_can_be_timed(work, kernel):
    runner = OnnxRuntime().call(work, kernel)
    assert 0 < runner.share <= 1
    assert runner.time_once() > 0


def test_a_fused_addition_is_measured_fused():
    work = Work("conv", (32, 32, 8, 8), (*CONV, (1,)))
    from cost_models.latency.onnx_timing import single_call

    assert "Add" not in operators(single_call(work, "float32"))


def test_the_fingerprint_is_of_the_processor_and_the_threads():
    one, two = OnnxRuntime(1).device(), OnnxRuntime(2).device()
    assert one == OnnxRuntime(1).device()
    assert one["fingerprint"] != two["fingerprint"]
    assert json.dumps(one)
