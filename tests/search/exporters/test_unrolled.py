"""Logic laid out for a network computes the integers of the reference."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_networks import JOINTS, Strided, calibrated, mlp, random_packed
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.errors import VerificationError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.reference import run
from search.capture import trace
from search.exporters.base import Companions, require_expressible
from search.exporters.delivery import deliver
from search.exporters.simulation import Bus
from search.exporters.unrolled import refusals, unroll
from search.exporters.verilog import VerilogExporter
from search.vectors import make_vectors, run_packed

pytest.importorskip("da4ml", reason="da4ml (extra fpga) is not installed")


class Branches(nn.Module):
    """Padding, groups, a residual, a concatenation, pooling and a slice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.last = nn.Linear(40, 5)

    def forward(self, x):
        y = F.relu(self.first(x))
        z = torch.cat([F.relu(self.second(y) + y), y[:, :2]], 1)
        pooled = F.max_pool2d(z, 2)
        mean = F.avg_pool2d(z, 2)
        return self.last(torch.cat([pooled, mean], 1).flatten(1)[:, :40])


CASES = {"mlp": (mlp, (6,)), "branches": (Branches, (2, 4, 4)), "strided": (Strided, (2, 11))}


def packed_of(name, weight_bits, activation_bits, seed, n=16):
    torch.manual_seed(seed)
    make, shape = CASES[name]
    net, x = make(), torch.randn(n, *shape)
    return calibrated(net, x, weight_bits, activation_bits), x


def assert_logic_equals_the_reference(packed, x):
    program = lower(packed.model)
    found = unroll(program, packed.model.graph)
    (source,) = found.inputs
    codes = source.codes.quantize(x.numpy()).reshape(len(x), -1)
    words = np.array([found.logic(row.astype(np.float64)) for row in codes]).astype(np.int64)
    ends = np.cumsum([port.n_words for port in found.outputs])[:-1]
    parts = np.split(words, ends, axis=1)
    for port, part, wanted in zip(
        found.outputs, parts, run(program, [x.numpy()]).values, strict=True
    ):
        np.testing.assert_array_equal(port.values(part), wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(CASES))
def test_sums_and_codes_are_those_of_the_reference(name, seed):
    rng = np.random.default_rng(seed)
    weight_bits, activation_bits = rng.choice([1, 1.6, 2, 3, 4, 6], 3), int(rng.choice([2, 4, 8]))
    packed, x = packed_of(name, weight_bits, activation_bits, seed)
    assert_logic_equals_the_reference(packed, x)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", JOINTS)
def test_values_are_joined_moved_and_padded_as_in_the_reference(name, seed):
    torch.manual_seed(seed)
    x = torch.randn(12, 2, 4, 4)
    packed = random_packed(JOINTS[name], (x,), seed, activation_bits=(3, 6), off_centre=1)
    assert_logic_equals_the_reference(packed, x)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("verilator") is None, reason="verilator is not installed")
@pytest.mark.parametrize("name", ["mlp", "branches"])
def test_verilator_runs_what_was_written(name, tmp_path):
    packed, x = packed_of(name, [2, 3, 1.6], 4, 0, n=200)
    vectors = make_vectors(packed, (x,))
    report = deliver(VerilogExporter(), packed, tmp_path / "out", Companions(vectors))
    assert report.largest_difference == 0
    again = VerilogExporter().open(tmp_path / "out")((x,))
    wanted = next(iter(run_packed(packed, (x,))))
    assert torch.equal(again[0], wanted)


def test_ports_that_are_damaged_are_refused(tmp_path):
    (tmp_path / "ports.json").write_text("{}")
    with pytest.raises(VerificationError, match="does not describe the ports"):
        VerilogExporter().open(tmp_path)


def test_what_cannot_be_laid_out_is_refused_by_name():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    traced = trace(net, (torch.randn(2, 4),))
    edges = {e.name: e.node for e in activation_edges(traced.graph)}
    found = calibrate(traced.graph, traced.params, [((torch.randn(64, 4),), None)], edges=edges)
    layers = {layer.name: 4.0 for layer in traced.graph.searchable_layers}
    model = WeightBank(traced.graph, traced.params, found).quantize(Candidate.of(layers))
    said = [str(r) for r in refusals(lower(model), traced.graph)]
    assert any("computes in float32" in line and "gelu" in line for line in said), said
    with pytest.raises(Exception, match="cannot express this model"):
        require_expressible(VerilogExporter(), PackedModel.from_model(model))


@given(
    rows=st.lists(
        st.tuples(st.integers(-8, 7), st.just(0), st.integers(0, 1000), st.integers(-4, 3)),
        min_size=1,
        max_size=5,
    )
)
def test_integers_survive_the_bus(rows):
    bus = Bus((4, 0, 10, 2), (True, False, False, True), (0, 0, 0, 1))
    integers = np.array([(a, b, c, d // 2 * 2) for a, b, c, d in rows])
    np.testing.assert_array_equal(bus.of_lines(bus.to_lines(integers)), integers)
