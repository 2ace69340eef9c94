"""The length of a packed file, from the graph and the candidate alone."""

import math
import weakref
from dataclasses import dataclass, field

from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.byte_stream import varint_bytes
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused
from quant_ops.graph import Graph, Layer
from quant_ops.manifest import encode_graph, param_order
from quant_ops.storage import (
    ACTIVATION_BYTES,
    DTYPE_BYTES,
    blob_bytes,
    float_bytes,
    head_bytes,
    plan_storage,
    prunes,
    quantized_params,
)

MAGIC = b"BTFR"
VERSION = 1
CODED_VERSION = 2  # of a file with entropy-coded layers
CHECKSUM_BYTES = 16
TENSOR_NAME = "bitfront"
PREFIX_BYTES = 8  # safetensors: the length of the header that follows
_ALIGNMENT = 8


def header(n_payload: int) -> bytes:
    """What safetensors puts before one uint8 tensor of `n_payload` bytes."""
    text = (
        f'{{"{TENSOR_NAME}":{{"dtype":"U8","shape":[{n_payload}],"data_offsets":[0,{n_payload}]}}}}'
    )
    text += " " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text.encode()


def size_bytes(graph: Graph, candidate: Candidate) -> int:
    """Length of the packed file of the folded network `graph` under `candidate`.

    Equal to `len(pack(model))` to the byte for every model of that graph and candidate.
    """
    n_payload = payload_bytes(graph, candidate)
    return len(header(n_payload)) + n_payload


def payload_bytes(graph: Graph, candidate: Candidate) -> int:
    """Length of the one tensor in the file."""
    graph, candidate = without_unused(graph, candidate)
    sizes = _sizes_of(graph)
    total = sizes.fixed + varint_bytes(len(candidate.activations))
    for edge, _ in candidate.activations:
        total += ACTIVATION_BYTES + varint_bytes(graph.index_of[edge])
    total += len(graph.layers) - len(candidate.layers)
    if not prunes(candidate):
        quantized = quantized_params(graph, candidate)
        total += sizes.float_bytes - sum(sizes.param_bytes[name] for name in quantized)
        return total + sum(sizes.layer_bytes(name, quant) for name, quant in candidate.layers)
    storage = plan_storage(graph, candidate)
    total += sum(float_bytes(param) for param in storage.floats)
    for layer, quant in zip(graph.layers, storage.quants, strict=True):
        if quant is not None:
            total += head_bytes(quant) + blob_bytes(layer, quant, storage.columns.get(layer.name))
    return total


def layer_term(graph: Graph, layer: Layer, quant: LayerQuant | float) -> int:
    """Bytes of one layer's table entry, codes, scales and bias where nothing is removed.

    A bare number is one width for the whole layer; 32 leaves it float.
    """
    sizes = _sizes_of(graph)
    if quant == FLOAT_BITS:
        params = {layer.weight, layer.bias} - {None}
        return 1 + sum(sizes.param_bytes[name] for name in params if name)
    as_quant = quant if isinstance(quant, LayerQuant) else LayerQuant((quant,))
    return sizes.layer_bytes(layer.name, as_quant)


@dataclass
class _GraphSizes:
    """What does not depend on the candidate, and the uniform layers met so far."""

    graph: "weakref.ref[Graph]"
    fixed: int  # magic, version, graph, checksum
    float_bytes: int  # all parameters in float
    param_bytes: dict[str, int]
    uniform: dict[tuple[str, LayerQuant], int] = field(default_factory=dict)

    def layer_bytes(self, name: str, quant: LayerQuant) -> int:
        """Table entry and blob of one layer that keeps all its columns."""
        found = self.uniform.get((name, quant))
        if found is None:
            graph = self.graph()
            assert graph is not None
            found = head_bytes(quant) + blob_bytes(graph.layer_of[name], quant)
            if quant.uniform is not None:
                self.uniform[name, quant] = found
        return found


_SIZES: dict[int, _GraphSizes] = {}


def _sizes_of(graph: Graph) -> _GraphSizes:
    # A graph hashes by all its nodes, so it is looked up by identity.
    found = _SIZES.get(id(graph))
    if found is not None and found.graph() is graph:
        return found
    key = id(graph)
    shapes, dtypes = dict(graph.param_shapes), dict(graph.param_dtypes)
    param_bytes = {}
    for name in param_order(graph):
        itemsize = DTYPE_BYTES[dtypes.get(name, "float32")]
        param_bytes[name] = itemsize * math.prod(shapes[name])
    fixed = len(MAGIC) + 1 + len(encode_graph(graph)) + CHECKSUM_BYTES
    sizes = _GraphSizes(
        weakref.ref(graph, lambda _: _SIZES.pop(key, None)),
        fixed,
        sum(param_bytes.values()),
        param_bytes,
    )
    _SIZES[key] = sizes
    return sizes
