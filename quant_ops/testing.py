"""Random candidates and quantized models for tests: every width, scheme and granularity."""

import random

import numpy as np
from numpy.typing import NDArray

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.candidate import SCHEMES, Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.graph import Graph, Layer, Params
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel, code_range
from quant_ops.storage import quantized_params, scale_groups
from quant_ops.stored import StoredBias, StoredScale


def random_quant(generator: random.Random, layer: Layer) -> LayerQuant:
    """Any scheme, some with groups; one width, a width per channel, or two runs of widths."""
    scheme = generator.choice(SCHEMES)
    grouped = generator.random() < 1 / 3
    group_size = generator.randint(1, layer.weights_per_channel) if grouped else None
    kind = generator.random()
    n = layer.out_channels
    if kind < 0.4:
        widths: tuple[float, ...] = (generator.choice(BIT_WIDTHS),)
    elif kind < 0.7:
        widths = tuple(generator.choice(BIT_WIDTHS) for _ in range(n))
    else:
        first = generator.randrange(n)
        widths = (generator.choice(BIT_WIDTHS),) * first
        widths += (generator.choice(BIT_WIDTHS),) * (n - first)
    return LayerQuant(widths, scheme, group_size)


def random_candidate(generator: random.Random, graph: Graph) -> Candidate:
    """Most searchable layers quantized, some values narrowed."""
    layers: dict[str, LayerQuant | float] = {
        layer.name: random_quant(generator, layer)
        for layer in graph.searchable_layers
        if generator.random() < 0.85
    }
    chosen = [edge.name for edge in activation_edges(graph) if generator.random() < 0.3]
    return Candidate.of(layers, {edge: generator.choice([2, 4, 8]) for edge in chosen})


def random_model(
    graph: Graph, params: Params, candidate: Candidate, seed: int = 0
) -> QuantizedModel:
    """Random codes, scales, biases and ranges under `candidate`; float parameters from `params`."""
    generator = np.random.default_rng(seed)
    layers = {
        name: _random_layer(generator, graph.layer_of[name], quant)
        for name, quant in candidate.layers
    }
    activations = {
        edge: _random_activation(generator, bit_width) for edge, bit_width in candidate.activations
    }
    quantized = quantized_params(graph, candidate)
    floats = {name: tensor for name, tensor in params.items() if name not in quantized}
    return QuantizedModel(graph, candidate, layers, activations, floats)


def _random_layer(
    generator: np.random.Generator, layer: Layer, quant: LayerQuant
) -> QuantizedLayer:
    widths = quant.per_channel(layer.out_channels)
    per_channel = np.asarray(widths)
    n_groups = scale_groups(layer, quant)
    codes = np.zeros((layer.out_channels, layer.weights_per_channel), np.int16)
    scales, offset = {}, set()
    for width in sorted(set(widths) - {0}):
        rows = np.flatnonzero(per_channel == width)
        low, high = code_range(width, quant.scheme)
        codes[rows] = generator.integers(low, high + 1, (len(rows), codes.shape[1]))
        scales[width] = StoredScale.nearest(generator.uniform(0.01, 1, (len(rows), n_groups)))
        if quant.scheme != "affine" and generator.random() < 0.5:
            offset.add(width)
    zero_points = None
    if quant.scheme == "affine":
        zero_points = _random_zero_points(generator, widths, n_groups)
    bias = None
    if layer.bias is not None:
        bias = StoredBias.nearest(generator.normal(size=layer.out_channels))
        bias.codes[per_channel == 0] = 0
    return QuantizedLayer(widths, codes, scales, frozenset(offset), zero_points, bias)


def _random_zero_points(
    generator: np.random.Generator, widths: tuple[float, ...], n_groups: int
) -> NDArray[np.int16]:
    top = np.array([code_range(w, "affine")[1] if w else 0 for w in widths])
    return generator.integers(0, top[:, None] + 1, (len(widths), n_groups)).astype(np.int16)


def _random_activation(generator: np.random.Generator, bit_width: int) -> ActivationQuant:
    signed = bool(generator.random() < 0.5)
    low, high = ActivationQuant(bit_width, signed, 1.0).code_range
    scale = float(np.float32(generator.uniform(0.01, 0.2)))
    return ActivationQuant(bit_width, signed, scale, int(generator.integers(low, high + 1)))
