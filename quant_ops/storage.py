"""What of a network a packed file holds under a candidate: decided by structure, never by values.

The writer, the reader and the size formula all follow the same `Storage`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bit_widths import code_bytes
from quant_ops.byte_stream import varint_bytes
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.graph import Graph, Layer, Params, Shape
from quant_ops.manifest import param_order
from quant_ops.removal import plan_removal, remove_channels

FLOAT32_BYTES = 4
BIAS_BYTES = 2
ACTIVATION_BYTES = 7  # width and sign, float32 scale, zero point; the node number comes on top
DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip
MIXED_BYTES = 2  # mask of the widths whose levels are offset by half a step


@dataclass(frozen=True, slots=True)
class FloatParam:
    """A parameter stored as it is, but for the indices in `kept` (axis to positions).

    `layer` is set when it is the weight of a layer that stays float: then `kept` counts along
    the axes of the canonical form.
    """

    name: str
    dtype: str
    shape: Shape
    kept: Mapping[int, NDArray[np.intp]] = field(default_factory=dict)
    layer: Layer | None = None


def scale_groups(layer: Layer, quant: LayerQuant) -> int:
    """Scales per output channel: 1, or weights_per_channel / group_size where that is whole."""
    if quant.group_size is None or layer.weights_per_channel % quant.group_size:
        return 1
    return layer.weights_per_channel // quant.group_size


def width_counts(layer: Layer, quant: LayerQuant) -> dict[float, int]:
    """Number of output channels of each width present but 0, ascending."""
    if quant.uniform is not None:
        return {quant.uniform: layer.out_channels} if quant.uniform else {}
    counts = Counter(quant.per_channel(layer.out_channels))
    return {width: counts[width] for width in sorted(counts) if width}


def runs(bit_widths: tuple[float, ...]) -> list[tuple[float, int]]:
    """(width, length) of each run of equal widths."""
    return [(width, len(list(run))) for width, run in groupby(bit_widths)]


def run_bytes(bit_widths: tuple[float, ...]) -> int:
    """Bytes of the run-length form of a width map."""
    lengths = [n for _, n in runs(bit_widths)]
    return varint_bytes(len(lengths)) + sum(1 + varint_bytes(n) for n in lengths)


def nibble_bytes(bit_widths: tuple[float, ...]) -> int:
    """Bytes of the form with four bits per channel."""
    return -(-len(bit_widths) // 2)


def head_bytes(quant: LayerQuant | None) -> int:
    """Bytes of one layer's entry in the quantization table; None is a layer that stays float."""
    if quant is None:
        return 1
    total = 1 + (0 if quant.group_size is None else varint_bytes(quant.group_size))
    if quant.uniform is not None:
        return total + 1
    return total + MIXED_BYTES + min(run_bytes(quant.bit_widths), nibble_bytes(quant.bit_widths))


def kept_weights(layer: Layer, columns: NDArray[np.intp] | None) -> int:
    """Codes of one output channel that are stored."""
    if columns is None:
        return layer.weights_per_channel
    return len(columns) * (layer.weights_per_channel // in_channels(layer))


def in_channels(layer: Layer) -> int:
    """Length of the canonical in axis, axis 1."""
    if layer.kind == "conv_transpose":
        return layer.weight_shape[0] // layer.groups
    return layer.weight_shape[1] if len(layer.weight_shape) > 1 else 1


def blob_bytes(layer: Layer, quant: LayerQuant, columns: NDArray[np.intp] | None = None) -> int:
    """Bytes of one layer's scales, zero points, codes and bias."""
    n_groups = scale_groups(layer, quant)
    per_scale = 2 if quant.scheme == "affine" else 1
    per_channel = kept_weights(layer, columns)
    counts = width_counts(layer, quant)
    total = sum(
        FLOAT32_BYTES + n * n_groups * per_scale + code_bytes(width, n * per_channel)
        for width, n in counts.items()
    )
    if layer.bias is not None and counts:
        total += FLOAT32_BYTES + BIAS_BYTES * sum(counts.values())
    return total


def float_bytes(param: FloatParam) -> int:
    """Bytes of a parameter that stays float."""
    total = DTYPE_BYTES[param.dtype]
    canonical = canonical_shape(param.layer) if param.layer else param.shape
    for axis, size in enumerate(canonical):
        total *= len(param.kept[axis]) if axis in param.kept else size
    return total


def canonical_shape(layer: Layer) -> Shape:
    """Shape of the canonical weight."""
    if layer.kind != "conv_transpose":
        return layer.weight_shape
    return (layer.out_channels, in_channels(layer), *layer.weight_shape[2:])


@dataclass(frozen=True)
class Storage:
    """What the file of one candidate holds.

    Attributes:
        quants: for each layer of the graph its LayerQuant, or None where it stays float.
        columns: layer name to the kept positions of the canonical in axis, where some are absent.
        floats: the parameters that are stored as they are, in order of first use.
    """

    graph: Graph
    candidate: Candidate
    quants: tuple[LayerQuant | None, ...]
    columns: Mapping[str, NDArray[np.intp]]
    floats: tuple[FloatParam, ...]


def plan_storage(graph: Graph, candidate: Candidate) -> Storage:
    """The storage of `graph` under `candidate`; the layers that it names must be the graph's."""
    assignment = candidate.assignment
    assert assignment.keys() <= graph.layer_of.keys(), "the candidate is of another graph"
    quants = tuple(assignment.get(layer.name) for layer in graph.layers)
    columns: Mapping[str, NDArray[np.intp]] = {}
    cut: Mapping[str, tuple[int, NDArray[np.intp]]] = {}
    if prunes(candidate):
        removal = plan_removal(graph, candidate)
        columns, cut = removal.columns, removal.params
    quantized = quantized_params(graph, candidate)
    float_layers = {layer.weight: layer for layer in graph.layers}
    shapes, dtypes = dict(graph.param_shapes), dict(graph.param_dtypes)
    floats = []
    for name in param_order(graph):
        if name in quantized:
            continue
        layer = float_layers.get(name)
        kept: dict[int, NDArray[np.intp]] = {}
        if layer is not None and layer.name in columns:
            kept[1] = columns[layer.name]
        elif name in cut:
            layer = None
            axis, kept_positions = cut[name]
            kept[axis] = kept_positions
        else:
            layer = None
        floats.append(FloatParam(name, dtypes.get(name, "float32"), shapes[name], kept, layer))
    return Storage(graph, candidate, quants, columns, tuple(floats))


def prunes(candidate: Candidate) -> bool:
    """Whether any channel has width 0."""
    return any(0 in quant.bit_widths for _, quant in candidate.layers)


def quantized_params(graph: Graph, candidate: Candidate) -> set[str]:
    """Names of the weights and biases that are stored as codes."""
    layers = [graph.layer_of[name] for name, _ in candidate.layers]
    return {layer.weight for layer in layers} | {layer.bias for layer in layers if layer.bias}


def remove_absent(
    graph: Graph, candidate: Candidate, params: Params
) -> tuple[Graph, dict[str, Tensor]]:
    """The network without the channels that a file of `candidate` does not hold."""
    return remove_channels(graph, params, plan_removal(graph, candidate))
