"""Random quantized networks for the tests of the C target, and what their libraries compute."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS, LEVELS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.graph import Layer
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel
from quant_ops.stored import StoredScale
from quant_ops.testing import random_model
from search.capture import trace
from search.exporters.c.compiler import LoadedLibrary, compile_c
from search.exporters.c.project import DESCRIPTION, expected, generate, vectors

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
) -> PackedModel:
    """Random codes in every layer, mixed widths in most; ranges from the values that arise.

    deep: scales small enough that values do not grow from layer to layer.
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
            zero_point = int(rng.integers(low, high + 1)) if rng.random() < 0.3 else max(low, 0)
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


Case = tuple[PackedModel, Sequence[Tensor]]


def assert_equal_to_referee(cases: Sequence[Case], folder: Path, *, levels: int = 3) -> None:
    """Every output integer of every case; one call of the compiler for all of them.

    levels: 3 for all kernels that the processor has, 1 for the portable ones alone, which compile
    in a fifth of the time.
    """
    descriptions = []
    for number, (packed, _) in enumerate(cases):
        library = generate(packed, f"n{number}")
        library.write(folder)
        descriptions.append(json.loads(library.files[DESCRIPTION]))
    shared = folder / "all.so"
    options = ["-O0", "-shared", "-fPIC"]  # -O1 takes three times as long
    if levels == 1:
        options.append("-DBITFRONT_PORTABLE")
    sources = [folder / f"n{number}.c" for number in range(len(cases))]
    compile_c(sources, shared, options)
    for number, (packed, inputs) in enumerate(cases):
        arrays = [x.numpy() for x in inputs]
        wanted = expected(lower(packed.model), arrays)
        for used in range(levels):
            got = LoadedLibrary(shared, descriptions[number], used).integers(arrays)
            for mine, theirs in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(mine, theirs, f"case {number}, level {used}")


def write_project(packed: PackedModel, inputs: Sequence[Tensor], folder: Path) -> None:
    """The folder as a user gets it, test vectors included."""
    generate(packed, "network").write(folder)
    arrays = [x.numpy() for x in inputs]
    wanted = expected(lower(packed.model), arrays)
    (folder / "vectors.bin").write_bytes(vectors(arrays, wanted))
