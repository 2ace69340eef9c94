"""Effective bit operations: how large a fully unrolled circuit becomes, to first order."""

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cost_models.base import CostModel, Kind
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import live_inputs
from quant_ops.edges import edge_of
from quant_ops.graph import Graph, Layer, Ref
from quant_ops.per_graph import per_graph
from quant_ops.quantized import QuantizedModel
from quant_ops.taps import tap_counts
from quant_ops.windows import geometry_of

Counts = NDArray[np.int64]


class EBOPs(CostModel):
    """Bits of each weight times bits of what it meets, over all multiplications of one sample.

    [Sun2024] with the conventions of HGQ2: the sign of a weight is free, so b stored bits count
    b - 1 (binary and ternary weights 1, affine ones b); an activation counts its stored bits. A
    multiplication by padding, by a channel of width 0 or of what such a channel gives is free.
    Biases are left out. Float weights and activations have 32 bits. `ebops_of` counts the digits
    of the codes themselves.
    """

    name: ClassVar[str] = "ebops"
    budget_key: ClassVar[str] = "ebops"
    unit: ClassVar[str] = "op"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        assignment, activation_bits = candidate.assignment, candidate.activation_bits
        live = live_inputs(graph, candidate)
        total = 0.0
        for layer in graph.layers:
            if not layer.macs:
                continue
            widths = _declared_bits(layer, assignment.get(layer.name))
            met = sum(
                _bits_at(graph, site, activation_bits) * int(counts.sum())
                for site, counts in _meetings(graph)[layer.name]
            )
            total += met * float(widths @ _live_per_channel(layer, live.get(layer.name)))
        return total


def ebops_of(model: QuantizedModel, *, spans: bool = False) -> float:
    """EBOPs of the stored codes: a weight counts the binary digits of its own code.

    Args:
        model: codes and activation widths.
        spans: count from the first to the last non-zero digit only, the exact figure of the paper
            [Sun2024], instead of down to the layer's own step as HGQ2 does.
    """
    graph, candidate = model.graph, model.candidate
    live = live_inputs(graph, candidate)
    total = 0.0
    for layer in graph.layers:
        if not layer.macs:
            continue
        digits = _digits(model, layer, spans=spans)
        mask = live.get(layer.name)
        if mask is not None:
            digits = digits * _live_columns(layer, mask)[:, :, None]
        for site, counts in _meetings(graph)[layer.name]:
            bits = _bits_at(graph, site, candidate.activation_bits)
            total += bits * float((digits * counts.reshape(-1)).sum())
    return total


def _declared_bits(layer: Layer, quant: LayerQuant | None) -> NDArray[np.float64]:
    if quant is None:
        return np.full(layer.out_channels, float(FLOAT_BITS))
    stored = np.ceil(quant.per_channel(layer.out_channels))
    if quant.scheme == "affine":
        return stored
    return np.where(stored > 1, stored - 1, stored)


def _digits(model: QuantizedModel, layer: Layer, *, spans: bool) -> NDArray[np.float64]:
    """(out_channels, input channels of a group, taps): binary digits of every weight."""
    shape = (layer.out_channels, _columns(layer), -1)
    quantized = model.layers.get(layer.name)
    if quantized is None:
        return np.full((layer.out_channels, layer.weights_per_channel), FLOAT_BITS).reshape(shape)
    codes = np.abs(quantized.doubled_codes().astype(np.int64))
    is_whole = ~np.isin(np.asarray(quantized.bit_widths), list(quantized.mid_rise))
    codes[is_whole] >>= 1
    if spans:
        codes //= np.maximum(codes & -codes, 1)
    digits: NDArray[np.float64] = np.frexp(codes.astype(np.float64))[1].astype(np.float64)
    return digits.reshape(shape)


def _bits_at(graph: Graph, site: int, activation_bits: dict[str, int]) -> int:
    source = graph.nodes[site].args[0]
    if not activation_bits or not isinstance(source, Ref):
        return FLOAT_BITS
    return activation_bits.get(edge_of(graph, source.index) or "", FLOAT_BITS)


def _columns(layer: Layer) -> int:
    """Input channels of one group."""
    if layer.kind == "conv_transpose":
        return layer.weight_shape[0] // layer.groups
    return layer.weight_shape[1]


def _live_columns(layer: Layer, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(out_channels, input channels of its group): 1 where the input is not always 0."""
    by_group = mask.reshape(layer.groups, _columns(layer)).astype(np.int64)
    return np.repeat(by_group, layer.out_channels // layer.groups, axis=0)


def _live_per_channel(layer: Layer, mask: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    if mask is None:
        return np.full(layer.out_channels, _columns(layer))
    live: NDArray[np.int64] = _live_columns(layer, mask).sum(axis=1)
    return live


@per_graph
def _meetings(graph: Graph) -> dict[str, list[tuple[int, Counts]]]:
    """Layer name to (site, how often each tap meets a value that is not padding)."""
    return {
        layer.name: [(site, _counts(graph, layer, site)) for site in layer.sites]
        for layer in graph.layers
        if layer.macs
    }


def _counts(graph: Graph, layer: Layer, site: int) -> Counts:
    node = graph.nodes[site]
    source = node.args[0]
    assert isinstance(source, Ref)
    shape = graph.nodes[source.index].shape
    kernel = layer.weight_shape[2:]
    if layer.kind == "linear":
        return np.array([math.prod(node.shape[:-1])])
    if layer.kind == "conv_transpose":
        return np.full(kernel, math.prod(shape[2:]))
    stride, pads, dilation, _ = geometry_of(node, kernel)
    return tap_counts(shape[2:], kernel, stride=stride, pads=pads, dilation=dilation)
