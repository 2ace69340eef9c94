"""The .pt2 file, loaded by torch alone, gives the integers of the reference."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.bitpack import pack_bits
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.packed import PackedModel
from search.capture import trace
from search.exporters.base import Companions, relative_difference
from search.exporters.torch_graph import unpacked
from search.exporters.torch_program import TorchExporter
from search.vectors import make_vectors, run_packed

REFERENCE_MODELS = Path(__file__).parents[2] / "quant_ops" / "reference_oracle.py"
_spec = importlib.util.spec_from_file_location("reference_models_for_torch", REFERENCE_MODELS)
assert _spec is not None
assert _spec.loader is not None
reference_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_models)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(self.b(x) + x), 2)
        return self.head(self.up(x).mean((2, 3)))


def packed_net(seed: int, *, integers: bool) -> tuple[PackedModel, Tensor]:
    x = reference_models.images(4, 3, 8, 8)
    model = reference_models.random_model(
        trace(Net(), (x,)), (x,), np.random.default_rng(seed), exact=False, widths=BIT_WIDTHS
    )
    quants = {
        name: LayerQuant(layer.bit_widths, "auto" if layer.zero_points is None else "affine")
        for name, layer in model.layers.items()
    }
    candidate = Candidate.of(quants, dict(model.candidate.activations) if integers else {})
    activations = model.activations if integers else {}
    return PackedModel.from_model(replace(model, candidate=candidate, activations=activations)), x


@pytest.mark.parametrize("integers", [True, False])
def test_a_program_equals_the_reference_for_any_batch(integers: bool, tmp_path: Path) -> None:
    packed, x = packed_net(0, integers=integers)
    exporter = TorchExporter()
    exporter.write(packed, tmp_path, Companions(make_vectors(packed, (x,))))
    run = exporter.open(tmp_path)
    tolerance = exporter.promise(packed).tolerance
    assert (tolerance == 0) == integers
    for n in (1, 3, 4):
        assert relative_difference(run([x[:n]]), run_packed(packed, (x[:n],))) <= tolerance


@pytest.mark.parametrize("width", [b for b in BIT_WIDTHS if b])
def test_every_code_is_unpacked(width: float) -> None:
    levels = 3 if width == 1.6 else 2 ** int(width)
    codes = np.arange(3 * levels + 1) % levels
    content = pack_bits(codes, width)
    content += bytes(-len(content) % (1 if width == 1.6 else int(width)))
    stream = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert unpacked(stream, width, len(codes)).tolist() == codes.tolist()
