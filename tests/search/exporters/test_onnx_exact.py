"""ONNX models that compute the normative integers: every way a rescaling is written."""

import importlib.util
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate
from quant_ops.dual import with_residuals
from quant_ops.edges import activation_edges
from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from quant_ops.requantize import Codes, Rescale, wide_codes
from quant_ops.runtime_mode import is_wide
from search.capture import trace
from search.exporters.base import Companions, require_expressible
from search.exporters.delivery import deliver
from search.exporters.onnx_graph.builder import IR_VERSION, OPSET, GraphBuilder
from search.exporters.onnx_graph.exact import Term, rescaled
from search.exporters.onnx_runtime import OnnxExporter, onnx_bytes, runner_of
from search.exporters.table import find_exporter
from search.vectors import make_vectors
from search.verify import verify_file

_spec = importlib.util.spec_from_file_location(
    "onnx_tests", Path(__file__).with_name("test_onnx.py")
)
assert _spec is not None
assert _spec.loader is not None
onnx_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(onnx_tests)
images, random_model = onnx_tests.images, onnx_tests.random_model


def computed(rescale: Rescale, codes: Codes, terms: list[Term], sums: list[np.ndarray]):
    """What ONNX Runtime makes of accumulators t0, t1, ... (channels, n), and the graph."""
    builder = GraphBuilder()
    state = SimpleNamespace(builder=builder, codes=lambda _: codes)
    name = rescaled(state, 0, rescale, terms)
    kind = TensorProto.FLOAT if is_wide(codes) else TensorProto.UINT8
    types = [TensorProto.FLOAT if t.unit != 1.0 else TensorProto.INT32 for t in terms]
    stored = [
        ((a + t.zero) * t.unit).astype(np.float32 if t.unit != 1.0 else np.int32)
        for a, t in zip(sums, terms, strict=True)
    ]
    graph = helper.make_graph(
        builder.nodes,
        "g",
        [helper.make_tensor_value_info(t.name, k, None) for t, k in zip(terms, types, strict=True)],
        [helper.make_tensor_value_info(name, kind, None)],
        builder.initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (result,) = session.run(None, {t.name: x for t, x in zip(terms, stored, strict=True)})
    return result, model


def accumulators(rng: np.random.Generator, rescale: Rescale, bounds: list[int]) -> list[np.ndarray]:
    """(channels, n) sums: random ones, the ends, and those at which the first moves the code."""
    drawn = [rng.integers(-b, b + 1, (rescale.shift.size, 300)) for b in bounds]
    for channel in range(rescale.shift.size):
        m, n = int(rescale.multipliers[0][channel, 0]), int(rescale.shift[channel, 0])
        if m:
            code = rng.integers(rescale.low, rescale.high + 1, 100) - rescale.zero_point
            at = [((int(c) << n) - int(rescale.offset[channel, 0])) // m for c in code]
            near = np.clip(at, -bounds[0], bounds[0] - 1)
            drawn[0][channel, :200] = np.concatenate([near, near + 1])
            for other in drawn[1:]:
                other[channel, :200] = 0
    drawn[0][:, -2:] = [-bounds[0], bounds[0]]
    return drawn


@pytest.mark.parametrize("seed", range(60))
def test_a_rescaling_gives_the_normative_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_terms, channels = int(rng.choice([1, 1, 1, 2, 3])), 3
    top = 30.9 if n_terms == 1 else 8
    bounds = [int(2 ** rng.uniform(2, top)) for _ in range(n_terms)]
    low, high = ((0, 255), (-128, 127), (0, 3), (-8, 7))[rng.integers(4)]
    size = (channels, 1)
    signs = rng.choice([-1.0, 1.0, 1.0, 0.0], (n_terms, *size))
    ratios = [s * 2 ** rng.uniform(-4, 9, size) / b for s, b in zip(signs, bounds, strict=True)]
    constant = rng.uniform(-300, 300, size) * rng.integers(0, 2, size)
    if seed % 3 == 0:
        reach = sum(np.abs(r) * b for r, b in zip(ratios, bounds, strict=True)) + np.abs(constant)
        codes = wide_codes(float(reach.max()))
        ratios = [r / codes.scale for r in ratios]
        constant = constant / codes.scale
    else:
        codes = Codes(0.1, int(rng.integers(low, high + 1)), low, high)
    rescale = Rescale.fitted(ratios, [np.full(size, float(b)) for b in bounds], constant, codes)
    zeros = [int(z) for z in rng.integers(0, 4, n_terms)]
    units = [float(rng.choice([1.0, 1.0, 2.0**-9])) if b < 2**24 else 1.0 for b in bounds]
    terms = [
        Term(f"t{i}", (-b, b), zero if unit == 1.0 else 0, unit)
        for i, (b, zero, unit) in enumerate(zip(bounds, zeros, units, strict=True))
    ]
    sums = accumulators(rng, rescale, bounds)
    result, _ = computed(rescale, codes, terms, sums)
    wanted = rescale(*sums)
    if seed % 3 == 0:
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, (wanted * codes.scale).astype(np.float32))
    else:
        np.testing.assert_array_equal(result.astype(np.int64) + codes.low, wanted)


@pytest.mark.parametrize(
    ("bound", "codes", "dtype"),
    [
        (2**9, Codes(1.0, 0, 0, 3), TensorProto.FLOAT),
        (2**18, Codes(1.0, -3, -128, 127), TensorProto.DOUBLE),
        (2**30, Codes(1.0, 9, 0, 255), TensorProto.DOUBLE),
        (2**18, Codes(2.0**-14, 0, -(2**24), 2**24), TensorProto.DOUBLE),
        (2**29, Codes(2.0**-14, 0, -(2**24), 2**24), TensorProto.INT64),
    ],
)
def test_the_shortest_type_that_holds_a_sum_is_taken(bound: int, codes: Codes, dtype: int) -> None:
    size = (4, 1)
    ratio = np.array([0.37, 0.51, -0.62, 0.99]).reshape(size) / codes.scale * 500 / bound
    rescale = Rescale.fitted(
        [ratio], [np.full(size, float(bound))], np.full(size, 1.23 / codes.scale), codes
    )
    sums = accumulators(np.random.default_rng(0), rescale, [bound])
    result, model = computed(rescale, codes, [Term("t0", (-bound, bound))], sums)
    (first, *_) = [node for node in model.graph.node if node.input[0] == "t0"]
    assert first.op_type == "Cast"
    assert first.attribute[0].i == dtype
    mine = result / codes.scale if is_wide(codes) else result.astype(np.int64) + codes.low
    np.testing.assert_array_equal(mine, rescale(*sums))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_a_long_sum_of_eight_bit_weights_runs_in_int64() -> None:
    x = images(2, 2048)
    model = random_model(nn.Sequential(nn.Linear(2048, 4)), x, widths=(8,), schemes=("mid_rise",))
    written = onnx_tests.assert_equal(model, (x,), "exact")
    assert operators(written)["Mod"] == 1


def test_sums_beyond_float32_run_as_convinteger() -> None:
    x = images(1, 640, 4, 4)
    model = random_model(nn.Conv2d(640, 2, 3), x, widths=(8,), schemes=("mid_rise",))
    written = onnx_tests.assert_equal(model, (x,), "exact")
    assert operators(written)["ConvInteger"] == 2
    assert "Conv" not in operators(written)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(tokens).relu())


def test_rows_of_a_table_are_the_normative_codes() -> None:
    onnx_tests.check("exact", Lookup(), onnx_tests.tokens(), seeds=2, widths=(1, 1.6, 3, 8))


@pytest.mark.parametrize("widths", [(1,), (1.6,)])
def test_one_bit_and_ternary_networks_with_one_channel_or_many(widths: tuple[float, ...]) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 6, 3, padding=2), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 1),
    )  # fmt: skip
    x = images(3, 3, 8, 9)
    onnx_tests.check("exact", module, x, seeds=2, widths=widths, activation_bits=(2, 8))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.inner(x)).mean((2, 3)))


def test_wide_half_sums_of_a_layer_and_its_residual_are_added_exactly() -> None:
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    traced = trace(Pair().eval(), (x[:2],))
    edges = {edge.name: edge.node for edge in activation_edges(traced.graph)}
    calibration = calibrate(traced.graph, traced.params, [((x,), None)], edges=edges)
    graph, params = with_residuals(traced.graph, traced.params, ("inner", "head"))
    widths = {layer.name: 2 if "residual" in layer.name else 4 for layer in graph.layers}
    bits = {e.name: 8 for e in activation_edges(graph) if e.kind not in ("output", "partial")}
    bank = WeightBank(graph, params, calibration, range_setter="weighted_mse")
    model = PackedModel.from_model(bank.quantize(Candidate.of(widths, bits))).model
    written = onnx_tests.assert_equal(model, (x,), "exact")
    assert operators(written)["Floor"] + operators(written)["Mod"] >= 4


def test_the_optimiser_leaves_weights_whole_and_nothing_to_unpack(tmp_path: Path) -> None:
    x = images(2, 3, 8, 8)
    model = random_model(onnx_tests.Residual(), x, widths=(2, 3, 4, 5), schemes=("mid_tread",))
    written = onnx_bytes(model, {}, exact=True)
    optimised = onnx_tests.optimised(written, tmp_path / "o.onnx")
    names = operators(optimised)
    fused = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "DequantizeLinear"}
    assert not (fused | {"Mod", "Gather", "ConvInteger"}) & set(names)
    weights = {node.input[1] for node in optimised.graph.node if node.op_type == "Conv"}
    assert len(weights) == 3
    for tensor in optimised.graph.initializer:
        if tensor.name in weights:
            array = numpy_helper.to_array(tensor)
            np.testing.assert_array_equal(array, np.rint(array))


def test_an_export_is_proven_equal_to_the_normative_reference(tmp_path: Path) -> None:
    x = images(4, 3, 8, 8)
    packed = PackedModel.from_model(random_model(onnx_tests.Residual(), x))
    out = tmp_path / "server"
    exporter = find_exporter("onnx").in_arithmetic("exact")
    report = deliver(exporter, packed, out, Companions(make_vectors(packed, (x,))))
    assert report.largest_difference == 0
    assert "equal to the reference's" in report.to_text()
    assert "normative" in report.facts["exactness"]
    assert verify_file(out).facts["test_vectors"].startswith("4 run")
    model = onnx.load(out / "model.onnx")
    assert {p.key: p.value for p in model.metadata_props}["bitfront.arithmetic"] == "exact"
    (mine,), (other,) = (
        runner_of(content, out)([x])
        for content in ((out / "model.onnx").read_bytes(), onnx_bytes(packed.model, {}))
    )
    assert not torch.equal(mine, other)


def test_float_operators_between_exact_steps_are_not_promised_equal() -> None:
    model = random_model(onnx_tests.TransformerBlock(), onnx_tests.tokens(), widths=(8,))
    packed = PackedModel.from_model(model)
    exporter = OnnxExporter("exact")
    assert "float operators" in exporter.promise(packed).text
    (mine,) = runner_of(onnx_bytes(model, {}, exact=True), Path("m"))([onnx_tests.tokens()])
    (wanted,) = exporter.expected(packed, [onnx_tests.tokens()])
    close = torch.isclose(mine, wanted, atol=0.02 * float(wanted.abs().max()))
    assert float(close.float().mean()) > 0.95


def test_what_has_no_integers_or_no_such_arithmetic_is_refused() -> None:
    packed = onnx_tests.weights_only(onnx_tests.Perceptron(), images(2, 20))
    with pytest.raises(UsageError, match="--activation-bits 8"):
        require_expressible(OnnxExporter("exact"), packed)
    with pytest.raises(UsageError, match="runtime or exact"):
        OnnxExporter("precise")
    with pytest.raises(UsageError, match="--to onnx"):
        find_exporter("torch").in_arithmetic("exact")
