"""HLS C++ computes the integers of the reference."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.errors import EnvironmentFault, UsageError, VerificationError
from quant_ops.packed import PackedModel
from quant_ops.requantize import Rescale
from search.capture import trace
from search.exporters.base import Companions, require_expressible
from search.exporters.c.reduced import reduced_program
from search.exporters.delivery import deliver
from search.exporters.hls import project
from search.exporters.hls.exporter import HLSExporter
from search.exporters.hls.rescaling import lanes_of, stages
from search.exporters.hls.translate import translate
from search.vectors import make_vectors, run_packed
from search.verify import verify_file

emulated = [
    pytest.mark.slow,
    pytest.mark.compiled,
    pytest.mark.skipif(
        project.installed_version() != project.VERSION,
        reason=f"hls4ml {project.VERSION} (extra hls) is not installed",
    ),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Residual(nn.Module):
    """Padding, groups, stride, a residual, a clamp inside a range, both poolings."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.third = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        y = F.hardtanh(self.first(x), -0.3, 0.4)
        y = F.max_pool2d(F.relu(self.second(y) + y), 2)
        return self.last(F.adaptive_avg_pool2d(self.third(y), 1).flatten(1))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.cat([self.first(x), self.second(x)], 1))


class Strided(nn.Module):
    """One dimension, dilation, two outputs, a mean that leaves."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 3, 3, stride=2, dilation=2)
        self.last = nn.Conv1d(3, 2, 1)

    def forward(self, x):
        y = self.last(F.hardtanh(self.first(x)))
        return y.mean(2), y


CASES = {
    "mlp": (mlp, (6,)),
    "residual": (Residual, (2, 8, 8)),
    "strided": (Strided, (2, 11)),
    "joined": (Joined, (6,)),
}


def packed_of(name, weight_bits, activation_bits, seed, n=100):
    torch.manual_seed(seed)
    make, shape = CASES[name]
    net, x = make().eval(), torch.randn(n, *shape)
    traced = trace(net, (x[:2],))
    edges = {e.name: e for e in activation_edges(traced.graph)}
    found = calibrate(
        traced.graph, traced.params, [((x,), None)], edges={n: e.node for n, e in edges.items()}
    )
    layers = {}
    for at, layer in enumerate(traced.graph.searchable_layers):
        bits = weight_bits[at % len(weight_bits)]
        layers[layer.name] = LayerQuant(tuple(map(float, np.atleast_1d(bits))))
    narrow = {n: activation_bits for n, e in edges.items() if e.kind not in ("output", "partial")}
    model = WeightBank(traced.graph, traced.params, found).quantize(Candidate.of(layers, narrow))
    return PackedModel.from_model(model), x


def assert_emulation_equals_the_reference(packed, x, folder):
    """On inputs that are no test vectors, too."""

    def measure(runner):
        for mine, wanted in zip(runner((x,)), run_packed(packed, (x,)), strict=True):
            assert torch.equal(mine, wanted)
        return {}

    vectors = make_vectors(packed, (x[:8],))
    report = deliver(HLSExporter(), packed, folder, Companions(vectors), measure)
    assert report.largest_difference == 0


class TestEmulation:
    pytestmark = emulated

    @pytest.mark.parametrize(
        ("name", "weight_bits", "activation_bits"),
        [
            ("mlp", [2.0, 3.0, 1.6], 4),
            ("residual", [4.0, 1.0, 8.0, 2.0], 8),
            ("strided", [3.0, 6.0], 5),
        ],
    )
    def test_equals_the_reference(self, name, weight_bits, activation_bits, tmp_path):
        packed, x = packed_of(name, weight_bits, activation_bits, seed=1)
        assert_emulation_equals_the_reference(packed, x, tmp_path / "out")

    def test_leaves_out_channels_of_width_0_and_is_verified(self, tmp_path, monkeypatch):
        widths = [0, 4, 0, 2, 3, 0, 0, 4]
        packed, x = packed_of("mlp", [widths, 4.0, 4.0], 8, seed=0)
        assert_emulation_equals_the_reference(packed, x, tmp_path / "out")
        assert "[4]" in (tmp_path / "out/firmware/weights/s4.h").read_text().splitlines()[0]
        monkeypatch.setattr(project, "require_hls4ml", lambda: pytest.fail("hls4ml was asked for"))
        assert "8 run" in verify_file(tmp_path / "out").facts["test_vectors"]
        weights = tmp_path / "out/firmware/weights/w3.h"
        weights.write_text(weights.read_text().replace("1", "2"))
        with pytest.raises(VerificationError, match="not the file that was exported"):
            verify_file(tmp_path / "out")


@given(
    limits=st.tuples(st.integers(-300, 300), st.integers(-300, 300)).map(sorted),
    ends=st.tuples(st.integers(-5000, 5000), st.integers(-5000, 5000)).map(sorted),
    multiplier=st.integers(1, 2**20),
    offset=st.integers(-(2**24), 2**24),
    zero_point=st.integers(-128, 255),
)
def test_types_round_and_saturate_as_the_rescaling_does(
    limits, ends, multiplier, offset, zero_point
):
    low, high = (limit + zero_point for limit in limits)
    m, o, n = (np.array([v], np.int64) for v in (multiplier, offset, 16))
    rescale = Rescale((m,), o, n, zero_point, low, high)
    least, most = (np.array([end], np.int64) for end in ends)
    lanes = lanes_of(rescale, np.zeros(1, np.int64), [(least, most)], "sum")
    sums = np.arange(ends[0], ends[1] + 1, max(1, (ends[1] - ends[0]) // 500))
    value = sums.astype(float)
    for stage in stages(lanes):
        value = assigned(value * stage.scale + stage.offset, stage.result)
        assert stage.reach[0] <= value.min()
        assert value.max() <= stage.reach[1]
    np.testing.assert_array_equal(value, rescale(sums) - zero_point)


def assigned(value, fixed):
    """What C++ stores: floor to the last bit, saturate or wrap."""
    words = np.floor(value * 2.0**fixed.fraction)
    low, high = (-(2 ** (fixed.width - 1)), 2 ** (fixed.width - 1) - 1)
    if not fixed.signed:
        low, high = 0, 2**fixed.width - 1
    assert fixed.saturates or ((words >= low) & (words <= high)).all()
    return np.clip(words, low, high) / 2.0**fixed.fraction


@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_every_constant_fits_its_type(name):
    packed, _ = packed_of(name, [4.0, 1.0, 8.0, 2.0], 8, seed=2)
    reduced = reduced_program(packed.model)
    for block in translate(reduced.program, reduced.graph).blocks:
        for kind in ("weight", "scale", "bias"):
            if kind in block.precision:
                stored = block.attributes[f"{kind}_data"]
                np.testing.assert_array_equal(assigned(stored, block.precision[kind]), stored)


def test_what_has_no_exact_form_is_refused_by_name():
    packed, _ = packed_of("joined", [4.0], 8, seed=0)
    with pytest.raises(UsageError, match=r"cannot express this model:\n.*concatenate.*C or ONNX"):
        require_expressible(HLSExporter(), packed)


def test_another_hls4ml_or_none_is_said_with_how_to_install_it(tmp_path, monkeypatch):
    packed, x = packed_of("mlp", [4.0], 8, seed=0)
    for found in ("0.8.1", None):
        monkeypatch.setattr(project, "installed_version", lambda found=found: found)
        with pytest.raises(EnvironmentFault, match=r"pip install 'bitfront\[hls\]'"):
            deliver(HLSExporter(), packed, tmp_path / "out", Companions(make_vectors(packed, (x,))))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[", '{"format": "bitfront-hls", "version": 1}'])
def test_ports_that_are_damaged_are_refused(text, tmp_path):
    (tmp_path / "ports.json").write_text(text)
    with pytest.raises(VerificationError, match="does not describe the ports"):
        HLSExporter().open(tmp_path)
