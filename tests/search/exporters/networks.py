"""Small networks, quantized at random or from data, for the tests of every integer target."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.bank import WeightBank
from quant_ops.bit_widths import BIT_WIDTHS, LEVELS
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.graph import Layer
from quant_ops.packed import PackedModel
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel
from quant_ops.stored import StoredScale
from quant_ops.testing import random_model
from search.capture import trace

C = nn.Conv2d


class Net(nn.Module):
    """A function of modules and an input."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Strided(nn.Module):
    """One dimension, dilation, two outputs, a mean that leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 3, 3, stride=2, dilation=2)
        self.last = nn.Conv1d(3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(F.hardtanh(self.first(x)))
        return y.mean(2), y


JOINTS: dict[str, Net] = {
    "sum of two scales": Net(
        lambda m, x: m.c(F.relu(m.a(x) + 0.5 * m.b(x))),
        a=C(2, 3, 3, padding=1),
        b=C(2, 3, 1),
        c=C(3, 2, 1),
    ),
    "padding": Net(
        lambda m, x: m.b(F.pad(m.a(x), (1, 0, 0, 2))), a=C(2, 3, 3, padding=1), b=C(3, 2, 3)
    ),
    "average": Net(
        lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, 1, ceil_mode=True, count_include_pad=False)),
        a=C(2, 3, 3, padding=1),
        b=C(3, 2, 2),
    ),
    "option A shortcut": Net(
        lambda m, x: (
            lambda y: F.relu(m.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))).mean((2, 3))
        )(F.relu(m.a(x))),
        a=C(2, 2, 3, padding=1),
        b=C(2, 4, 3, stride=2, padding=1),
    ),
    "concatenation": Net(
        lambda m, x: m.c(torch.cat([m.a(x), F.relu(m.b(x)), x[:, 1:]], 1)),
        a=C(2, 2, 3, padding=1),
        b=C(2, 1, 1),
        c=C(4, 2, 1),
    ),
    "several readers": Net(
        lambda m, x: (
            lambda y: (
                lambda z: torch.cat([m.c(z), y.transpose(2, 3), z[:, :, :, :2]], 3).flatten(1)
            )(F.relu(m.b(y) + y))
        )(F.relu(m.a(x))),
        a=C(2, 2, 3, padding=1),
        b=C(2, 2, 1),
        c=C(2, 2, 3, padding=1),
    ),
}
"""What joins, moves and rescales values, for images (2, 4, 4)."""


def calibrated(
    net: nn.Module,
    x: Tensor,
    weight_bits: Sequence[float | Sequence[float]],
    activation_bits: int,
) -> PackedModel:
    """Quantized as a search would: ranges from data, `weight_bits` layer by layer."""
    traced = trace(net.eval(), (x[:2],))
    edges = {e.name: e for e in activation_edges(traced.graph)}
    found = calibrate(
        traced.graph, traced.params, [((x,), None)], edges={n: e.node for n, e in edges.items()}
    )
    layers = {}
    for at, layer in enumerate(traced.graph.searchable_layers):
        bits = np.atleast_1d(weight_bits[at % len(weight_bits)])
        layers[layer.name] = LayerQuant(tuple(bits.astype(float).tolist()))
    narrow = {n: activation_bits for n, e in edges.items() if e.kind not in ("output", "partial")}
    model = WeightBank(traced.graph, traced.params, found).quantize(Candidate.of(layers, narrow))
    return PackedModel.from_model(model)


SCHEMES = ("mid_tread", "mid_rise", "affine")


def random_packed(
    net: nn.Module,
    inputs: Sequence[Tensor],
    seed: int,
    *,
    widths: Sequence[float] = BIT_WIDTHS,
    schemes: Sequence[str] = SCHEMES,
    activation_bits: Sequence[int] = (8,),
    deep: bool = False,
    off_centre: float = 0.3,
) -> PackedModel:
    """Random codes in every layer, mixed widths in most; ranges from the values that arise.

    deep: scales small enough that values do not grow from layer to layer.
    off_centre: share of the edges whose zero point is any code.
    """
    rng = np.random.default_rng(seed)
    traced = trace(net.eval(), tuple(x[:1] for x in inputs))
    graph = traced.graph

    def quant(layer: Layer) -> LayerQuant:
        own = rng.choice(widths, layer.out_channels if rng.random() < 0.7 else 1)
        scheme = str(rng.choice(schemes))
        if 1 in own and scheme == "mid_tread":
            scheme = "mid_rise"
        return LayerQuant(tuple(own.tolist()), scheme)

    layers = {layer.name: quant(layer) for layer in graph.searchable_layers}
    bits = {
        edge.name: int(rng.choice(activation_bits))
        for edge in activation_edges(graph)
        if edge.kind != "output"
    }
    bare = random_model(graph, traced.params, Candidate.of(layers), seed)
    if deep:
        tamed = {name: _tamed(graph.layer_of[name], q) for name, q in bare.layers.items()}
        bare = replace(bare, layers=tamed)
    found: dict[str, ActivationQuant] = {}

    def ranging(name: str):  # type: ignore[no-untyped-def]
        def observe(x: Tensor) -> Tensor:
            top = max(float(x.abs().max()), 1e-3)
            signed = bool(x.min() < 0) or bool(rng.integers(2))
            high = ActivationQuant(bits[name], signed, 1.0).code_range[1]
            low, high = ActivationQuant(bits[name], signed, 1.0).code_range
            zero_point = (
                int(rng.integers(low, high + 1)) if rng.random() < off_centre else max(low, 0)
            )
            scale = float(np.float32(top / max(high - zero_point, 1)))
            found[name] = ActivationQuant(bits[name], signed, scale, zero_point)
            return found[name].fake_quantize(x)

        return observe

    transforms = {e.node: ranging(e.name) for e in activation_edges(graph) if e.name in bits}
    with torch.inference_mode():
        Executor(graph).run(bare.params(), inputs, transforms=transforms)
    candidate = Candidate.of(layers, bits)
    model = QuantizedModel(graph, candidate, bare.layers, found, bare.float_params)
    return PackedModel.from_model(model)


def _tamed(layer: Layer, quantized: QuantizedLayer) -> QuantizedLayer:
    scales = {
        width: StoredScale(
            np.float32(float(stored.base) / (layer.weights_per_channel**0.5 * LEVELS[width] / 2)),
            stored.ratio,
        )
        for width, stored in quantized.scales.items()
    }
    return replace(quantized, scales=scales)
