"""HLS C++ computes the integers of the reference."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import JOINTS, C, Net, Strided, calibrated, mlp, random_packed
from torch import nn

from quant_ops.errors import EnvironmentFault, UsageError, VerificationError
from quant_ops.packed import PackedModel
from search.config import RunConfig
from search.exporters.base import Companions, require_expressible
from search.exporters.delivery import deliver
from search.exporters.foresight import foreseen_refusals
from search.exporters.hls import project
from search.exporters.hls.exporter import HLSExporter
from search.prepare import prepare
from search.task import Task
from search.vectors import make_vectors, run_packed
from search.verify import verify_file

emulated = [pytest.mark.slow, pytest.mark.compiled]


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


CASES = {"mlp": (mlp, (6,)), "residual": (Residual, (2, 8, 8)), "strided": (Strided, (2, 11))}
WINDOWED = Net(
    lambda m, x: (
        lambda y: torch.cat(
            [
                m.b(F.max_pool2d(y, 3, 2, 1)).flatten(1),
                y.amin((2, 3)),
                m.c(y.mean((2, 3))) * y.amax((2, 3)),
                m.d(y.permute(0, 2, 3, 1)).mean((1, 2)),
            ],
            1,
        )
    )(m.a(x)),
    a=C(2, 2, 3, padding=1),
    b=nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1),
    c=nn.Linear(2, 2),
    d=nn.Linear(2, 3),
)


def packed_of(name, weight_bits, activation_bits, seed, n=100):
    torch.manual_seed(seed)
    make, shape = CASES[name]
    net, x = make(), torch.randn(n, *shape)
    return calibrated(net, x, weight_bits, activation_bits), x


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

    @pytest.mark.parametrize("name", [*JOINTS, "windows"])
    def test_joins_moves_and_pads_as_the_reference(self, name, tmp_path):
        torch.manual_seed(3)
        x = torch.randn(100, 2, 4, 4)
        net = JOINTS.get(name, WINDOWED)
        packed = random_packed(net, (x,), 3, activation_bits=(3, 6), off_centre=1)
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


IMAGE = (3, 2, 4, 4)
REFUSED = {
    "sorting": (
        Net(lambda m, x: m.a(x).topk(2, 1)[0].mean((2, 3)), a=C(2, 3, 1)),
        torch.ones(IMAGE),
        "sorts values",
    ),
    "places": (
        Net(lambda m, x: m.a(x).max(1), a=C(2, 3, 1)),
        torch.ones(IMAGE),
        "needs the places of the largest values",
    ),
    "float": (
        Net(lambda m, x: m.a(F.gelu(x)), a=C(2, 3, 1)),
        torch.ones(IMAGE),
        "computes in float32",
    ),
    "size": (
        Net(lambda m, x: m.a(x).mean((2, 3)), a=C(2, 512, 3)),
        torch.ones(3, 2, 24, 24),
        "400,000 products side by side",
    ),
    "rows by index": (
        Net(lambda m, x: m.a(m.e(x).mean(1)), e=nn.Embedding(9, 4), a=nn.Linear(4, 2)),
        torch.arange(9).reshape(3, 3),
        r"has no exact form \(lookup\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_by_name(case):
    net, x, reason = REFUSED[case]
    packed = random_packed(net, (x,), 0)
    with pytest.raises(UsageError, match=rf"cannot express this model:\n  \w.*: .*{reason}.*; \w"):
        require_expressible(HLSExporter(), packed)


@pytest.mark.parametrize("name", ["concatenation", "sorting", "float", "size"])
def test_a_search_for_the_target_is_refused_where_the_export_would_be(name):
    net, x, _ = REFUSED.get(name) or (JOINTS[name], torch.ones(IMAGE), "")
    labels = torch.zeros(len(x), dtype=torch.long)
    task = Task(
        "small",
        nn.Sequential(net.eval(), nn.Flatten()),
        calibration=[((x,), None)],
        validation=[((x,), labels)],
    )
    prepared = prepare(task, RunConfig(task="small", target="hls"))
    model = prepared.evaluator.bank.quantize(prepared.space.largest())
    refused = HLSExporter().refusals(PackedModel.from_model(model))
    assert bool(foreseen_refusals(prepared)) == bool(refused) == (name in REFUSED)


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
