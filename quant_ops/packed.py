"""The packed file: written, read back, run.

One safetensors file with one uint8 tensor; `FORMAT.md` is normative. Nothing in it is code, a
path or a name. Without the entropy codec every length is known from the graph and the candidate.
"""

import hashlib
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quant_ops.blobs import (
    put_activation,
    put_float,
    put_layer,
    put_quant,
    read_activation,
    read_float,
    read_layer,
    read_quant,
)
from quant_ops.byte_stream import ByteReader, put_varint
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.coded import CODECS, layer_codes
from quant_ops.dual import without_unused_layers
from quant_ops.edges import activation_edges
from quant_ops.errors import EnvironmentFault, UsageError, VerificationError
from quant_ops.executor import Executor
from quant_ops.graph import Graph
from quant_ops.manifest import decode_graph, encode_graph
from quant_ops.packed_size import (
    CHECKSUM_BYTES,
    CODED_VERSION,
    MAGIC,
    PREFIX_BYTES,
    VERSION,
    header,
    size_bytes,
)
from quant_ops.quantized import ActivationQuant, QuantizedModel
from quant_ops.storage import Storage, plan_storage, prunes, remove_absent

__all__ = ["PackedModel", "describe", "pack", "read", "size_bytes"]

_EXECUTION_ERRORS = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, MemoryError
)  # fmt: skip
_MAX_CHANNELS = 2**24
_MAX_ELEMENTS_PER_BYTE = 1024
_ALWAYS_ALLOWED_ELEMENTS = 2**28


def pack(model: QuantizedModel, codec: str = "plain") -> bytes:
    """The file of `model`.

    Plain: `size_bytes(model.graph, model.candidate)` bytes. Entropy: layers whose codes are
    shorter that way are entropy-coded, so at most as many; how many depends on the codes.

    Raises:
        UsageError: the graph holds an argument that the format cannot, or there is no such codec.
    """
    if codec not in CODECS:
        raise UsageError(f"the codec must be one of {', '.join(CODECS)}, got {codec!r}")
    model = without_unused_layers(model)
    storage = plan_storage(model.graph, model.candidate)
    pairs = list(zip(model.graph.layers, storage.quants, strict=True))
    codes = {
        layer.name: layer_codes(
            layer, quant, model.layers[layer.name], storage.columns.get(layer.name), codec
        )
        for layer, quant in pairs
        if quant is not None
    }
    out = bytearray(MAGIC)
    out.append(CODED_VERSION if any(c.coded for c in codes.values()) else VERSION)
    out += encode_graph(model.graph)
    for layer, quant in pairs:
        if quant is None:
            put_quant(out, None, frozenset())
        else:
            put_quant(out, quant, model.layers[layer.name].mid_rise, codes[layer.name].coded)
    put_varint(out, len(model.candidate.activations))
    for edge, bit_width in model.candidate.activations:
        activation = model.activations[edge]
        assert activation.bit_width == bit_width, edge
        put_activation(out, model.graph.index_of[edge], activation)
    for layer, quant in pairs:
        if quant is not None:
            put_layer(out, layer, quant, model.layers[layer.name], codes[layer.name])
    for param in storage.floats:
        put_float(out, param, model.float_params[param.name])
    out += _checksum(out)
    data = header(len(out)) + bytes(out)
    plain_bytes = size_bytes(model.graph, model.candidate)
    assert len(data) == plain_bytes if out[len(MAGIC)] == VERSION else len(data) < plain_bytes
    return data


def _checksum(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def read(data: bytes) -> QuantizedModel:
    """The model in a packed file, every tensor in its full shape.

    Names are those of `quant_ops.manifest.anonymous`. Codes of removed columns stand for zero.

    Raises:
        VerificationError: `data` is not an undamaged packed file.
    """
    reader = ByteReader(_payload(data))
    if bytes(reader.take(len(MAGIC))) != MAGIC:
        raise VerificationError("the file is not a packed model: it does not begin with its mark")
    version = reader.byte()
    if version not in (VERSION, CODED_VERSION):
        raise VerificationError(
            f"the file has format version {version}, this program reads versions {VERSION} and "
            f"{CODED_VERSION}; use a release that knows it"
        )
    graph = decode_graph(reader)
    _require_reasonable(graph, len(data))
    may_be_coded = version == CODED_VERSION
    entries = [read_quant(reader, layer, may_be_coded=may_be_coded) for layer in graph.layers]
    if may_be_coded and not any(entry.coded for entry in entries):
        raise reader.fault(f"no layer is coded in a file of version {CODED_VERSION}")
    activations = [read_activation(reader, len(graph.nodes)) for _ in range(reader.count())]
    if len({index for index, _ in activations}) < len(activations):
        raise reader.fault("a value has two quantizers")
    edges = {graph.nodes[index].name: activation for index, activation in activations}
    storage = _storage(graph, [entry.quant for entry in entries], edges)
    layers = {}
    for layer, entry in zip(graph.layers, entries, strict=True):
        if entry.quant is not None:
            columns = storage.columns.get(layer.name)
            layers[layer.name] = read_layer(reader, layer, entry, columns)
    floats = {param.name: read_float(reader, param) for param in storage.floats}
    if reader.remaining:
        raise reader.fault(f"{reader.remaining} bytes too many")
    return QuantizedModel(graph, storage.candidate, layers, edges, floats)


def _payload(data: bytes) -> memoryview:
    n_header = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
    n_payload = len(data) - n_header
    if n_payload <= CHECKSUM_BYTES or data[:n_header] != header(n_payload):
        raise VerificationError(
            f"the {len(data):,} bytes are not a packed model: a safetensors header of that length "
            f"with one uint8 tensor 'bitfront' is missing; the file is cut short or of another kind"
        )
    payload = memoryview(data)[n_header:]
    content, stored = payload[:-CHECKSUM_BYTES], payload[-CHECKSUM_BYTES:]
    if _checksum(content) != stored:
        raise VerificationError(
            "the checksum of the packed model does not match its content; the file is damaged, "
            "copy or export it again"
        )
    return content


def _require_reasonable(graph: Graph, n_bytes: int) -> None:
    elements = 0
    for _, shape in graph.param_shapes:
        elements += torch.Size(shape).numel()
    channels = max((layer.out_channels for layer in graph.layers), default=0)
    limit = max(_ALWAYS_ALLOWED_ELEMENTS, _MAX_ELEMENTS_PER_BYTE * n_bytes)
    if elements > limit or channels > _MAX_CHANNELS:
        raise VerificationError(
            f"the file claims {elements:,} parameters and up to {channels:,} channels in "
            f"{n_bytes:,} bytes; it is damaged"
        )


def _storage(
    graph: Graph, quants: list[LayerQuant | None], edges: dict[str, ActivationQuant]
) -> Storage:
    layers = {
        layer.name: quant
        for layer, quant in zip(graph.layers, quants, strict=True)
        if quant is not None
    }
    candidate = Candidate.of(layers, {edge: a.bit_width for edge, a in edges.items()})
    try:
        return plan_storage(graph, candidate)
    except Exception as error:  # the removal plan follows a graph that anybody may have written
        raise VerificationError(
            f"the graph in the packed model contradicts itself ({type(error).__name__}); "
            f"the file is damaged"
        ) from error


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A packed file in memory. Call it like the float model: inputs batch first, outputs a tuple.

    Attributes:
        data: the bytes of the file.
        model: what they hold, every tensor in its full shape.
    """

    data: bytes
    model: QuantizedModel

    @classmethod
    def from_model(cls, model: QuantizedModel, codec: str = "plain") -> Self:
        """Pack `model` and read it back."""
        return cls.from_bytes(pack(model, codec))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a packed file that is in memory; raises VerificationError."""
        return cls(data, read(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a packed file.

        Raises:
            UsageError: there is no such file, or it cannot be read.
            VerificationError: it is not an undamaged packed file.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UsageError(
                f"cannot read the packed model {path}: {error.strerror}; give the path of a file "
                f"that `search export` or `search run` wrote"
            ) from error
        try:
            return cls.from_bytes(data)
        except VerificationError as error:
            raise VerificationError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, read it back, compare; `path` holds the whole file or what it held.

        Raises:
            EnvironmentFault: the file cannot be written, or reads back differently.
        """
        _write_whole(Path(path), self.data)

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.data)

    @property
    def version(self) -> int:
        """Of the format."""
        return self.data[
            PREFIX_BYTES + int.from_bytes(self.data[:PREFIX_BYTES], "little") + len(MAGIC)
        ]

    @property
    def codec(self) -> str:
        """`entropy` where at least one layer is coded, else `plain`."""
        return "entropy" if self.version == CODED_VERSION else "plain"

    @property
    def digest(self) -> str:
        """The stored checksum, 32 hexadecimal digits."""
        return self.data[-CHECKSUM_BYTES:].hex()

    def reduced(self) -> tuple[Graph, dict[str, Tensor]]:
        """The network without its removed channels, and its parameters."""
        return self._reduced

    @cached_property
    def _reduced(self) -> tuple[Graph, dict[str, Tensor]]:
        params = self.model.params()
        if not prunes(self.model.candidate):
            return self.model.graph, params
        return remove_absent(self.model.graph, self.model.candidate, params)

    @cached_property
    def _executor(self) -> Executor:
        return Executor(self._reduced[0])

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output, or all of several in the order of the graph.

        Activations are fake-quantized in float where the file says so; `quant_ops.reference`
        computes the same in integers.

        Raises:
            UsageError: inputs that do not fit the graph.
            VerificationError: the stored graph cannot be executed.
        """
        graph = self.model.graph
        wanted = [graph.nodes[i].shape[1:] for i in graph.input_nodes]
        got = [tuple(x.shape[1:]) for x in inputs]
        if len(got) != len(wanted):
            raise UsageError(f"the model has {len(wanted)} inputs, {len(got)} were given")
        try:
            reduced, params = self._reduced
            quantizers = self.model.activations
            transforms = {
                edge.node: quantizers[edge.name].fake_quantize
                for edge in activation_edges(reduced)
                if edge.name in quantizers
            }
            outputs = self._executor.run(params, inputs, transforms=transforms)[0]
            return outputs[0] if len(outputs) == 1 else outputs
        except _EXECUTION_ERRORS as error:
            if got != wanted:
                raise UsageError(
                    f"the model was captured with inputs of shape {wanted} for one sample, "
                    f"{got} were given: {error}"
                ) from error
            raise VerificationError(f"the stored graph cannot be executed: {error}") from error


def _write_whole(path: Path, data: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != data:
            raise EnvironmentFault(
                f"{path} was written but reads back differently; check the disk and try again"
            )
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the packed model {path} ({len(data):,} bytes): {error.strerror}; free "
            f"some space or choose a folder that can be written"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a packed file holds, as a JSON value, for `search verify`.

    Raises:
        UsageError, VerificationError: as `PackedModel.load`.
    """
    packed = PackedModel.load(path)
    model = packed.model
    channels: Counter[float] = Counter()
    weights: Counter[float] = Counter()
    for name, quantized in model.layers.items():
        for width, n in Counter(quantized.bit_widths).items():
            channels[width] += n
            weights[width] += n * model.graph.layer_of[name].weights_per_channel
    return {
        "format": "bitfront-packed",
        "version": packed.version,
        "codec": packed.codec,
        "digest": packed.digest,
        "size_bytes": packed.size_bytes,
        "graph_bytes": len(encode_graph(model.graph)),
        "float_bytes": sum(t.numel() * t.element_size() for t in model.float_params.values()),
        "n_operators": len(model.graph.nodes),
        "n_layers": len(model.graph.layers),
        "n_quantized_layers": len(model.layers),
        "channels_by_bit_width": {f"{width:g}": channels[width] for width in sorted(channels)},
        "weights_by_bit_width": {f"{width:g}": weights[width] for width in sorted(weights)},
        "activations_by_bit_width": {
            str(width): n
            for width, n in sorted(Counter(dict(model.candidate.activations).values()).items())
        },
    }
