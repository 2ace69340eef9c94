"""The codes of a layer as bytes: plain bits, or entropy-coded where that is shorter.

`FORMAT.md`, sections 6 and 8, is normative.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.bit_widths import LEVELS, TERNARY, code_bytes
from quant_ops.bitpack import pack_bits, unpack_bits
from quant_ops.byte_stream import ByteReader, put_varint
from quant_ops.candidate import LayerQuant
from quant_ops.graph import Layer
from quant_ops.quantized import QuantizedLayer, code_range
from quant_ops.rans import (
    STATE_BYTES,
    WORD_BYTES,
    decode,
    encode,
    frequencies_of,
    ideal_bits,
    lanes,
    table_of,
)
from quant_ops.storage import in_channels, width_counts

CODECS = ("plain", "entropy")
_PLAIN = 0  # mode byte; 1 + r: coded, the lowest r bits of each code apart


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """Width to the bytes of its codes; `coded` when at least one width is entropy-coded."""

    coded: bool
    blobs: Mapping[float, bytes]

    @property
    def size_bytes(self) -> int:
        """Of all widths."""
        return sum(map(len, self.blobs.values()))


def layer_codes(
    layer: Layer,
    quant: LayerQuant,
    quantized: QuantizedLayer,
    columns: NDArray[np.intp] | None,
    codec: str = "plain",
) -> LayerCodes:
    """The codes of one layer as bytes; coded where `codec` asks for it and the layer gains."""
    bit_widths = quant.per_channel(layer.out_channels)
    assert bit_widths == quantized.bit_widths, layer.name
    per_channel = np.asarray(bit_widths)
    codes = _as_matrix(layer, quantized.codes, columns)
    live: dict[float, NDArray[np.int16]] = {}
    for width in width_counts(layer, quant):
        low, high = code_range(width, quant.scheme)
        live[width] = codes[rows_of(per_channel, width)]
        assert live[width].min(initial=low) >= low, layer.name
        assert live[width].max(initial=high) <= high, layer.name
        live[width] = live[width] - np.int16(low)
    plain = LayerCodes(False, {width: pack_bits(rows, width) for width, rows in live.items()})
    if codec == "plain":
        return plain
    coded = LayerCodes(True, {width: coded_blob(rows, width) for width, rows in live.items()})
    return coded if coded.size_bytes < plain.size_bytes else plain


def rows_of(per_channel: NDArray[np.float64], width: float) -> slice | NDArray[np.intp]:
    """Which output channels have a width; a slice where all have it."""
    rows = np.flatnonzero(per_channel == width)
    return slice(None) if len(rows) == len(per_channel) else rows


def _as_matrix(
    layer: Layer, codes: NDArray[np.int16], columns: NDArray[np.intp] | None
) -> NDArray[np.int16]:
    if columns is None:
        return codes
    return codes.reshape(layer.out_channels, in_channels(layer), -1)[:, columns].reshape(
        layer.out_channels, -1
    )


def coded_blob(codes: NDArray[np.integer], bit_width: float) -> bytes:
    """Mode byte and codes in whichever form is shortest; at most one byte above the plain form.

    Args:
        codes: any shape, in C order; values 0 .. levels - 1.
        bit_width: 1, 1.6 or 2..8.
    """
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    plain = bytes([_PLAIN]) + pack_bits(flat, bit_width)
    if not flat.size:
        return plain
    counts = np.bincount(flat, minlength=LEVELS[bit_width])
    low_bits = min(_splits(bit_width), key=lambda r: _estimated_bytes(counts, flat.size, r))
    if _estimated_bytes(counts, flat.size, low_bits) > len(plain) + STATE_BYTES:
        return plain
    coded = _coded(flat, counts, low_bits)
    return coded if len(coded) < len(plain) else plain


def _splits(bit_width: float) -> range:
    return range(1) if bit_width == TERNARY else range(int(bit_width))


def _merged(counts: NDArray[np.int64], low_bits: int) -> NDArray[np.int64]:
    merged: NDArray[np.int64] = counts.reshape(-1, 1 << low_bits).sum(axis=1)
    return merged


def _estimated_bytes(counts: NDArray[np.int64], n_codes: int, low_bits: int) -> float:
    high = _merged(counts, low_bits)
    bits = ideal_bits(high, frequencies_of(table_of(high))) + n_codes * low_bits
    return 1 + len(high) + bits / 8 + STATE_BYTES * lanes(n_codes)


def _coded(flat: NDArray[np.uint8], counts: NDArray[np.int64], low_bits: int) -> bytes:
    table = table_of(_merged(counts, low_bits))
    stream = encode(flat >> np.uint8(low_bits), frequencies_of(table))
    out = bytearray([1 + low_bits])
    out += table
    put_varint(out, (len(stream) - STATE_BYTES * lanes(flat.size)) // WORD_BYTES)
    out += stream
    if low_bits:
        out += pack_bits(flat & np.uint8((1 << low_bits) - 1), low_bits)
    return bytes(out)


def read_coded_blob(reader: ByteReader, bit_width: float, n_codes: int) -> NDArray[np.uint8]:
    """Inverse of `coded_blob`, (n_codes,).

    Raises:
        VerificationError: bytes that are no such blob, or longer than they need to be.
    """
    start, plain_bytes = reader.position, code_bytes(bit_width, n_codes)
    mode = reader.byte()
    if mode == _PLAIN:
        return unpack_bits(reader.take(plain_bytes), bit_width, n_codes)
    low_bits = mode - 1
    if low_bits not in _splits(bit_width) or not n_codes:
        raise reader.fault(f"codes of {bit_width:g} bits cannot be stored in mode {mode}")
    table = reader.take(LEVELS[bit_width] >> low_bits)
    if not any(table):
        raise reader.fault("a table of frequencies is all 0")
    n_words = reader.varint(reader.remaining // WORD_BYTES + 1)
    stream = reader.take(STATE_BYTES * lanes(n_codes) + WORD_BYTES * n_words)
    low = reader.take(code_bytes(low_bits, n_codes))
    if reader.position - start > plain_bytes:
        raise reader.fault("coded codes are longer than plain ones")
    codes = decode(stream, frequencies_of(table), n_codes) << np.uint8(low_bits)
    return codes | unpack_bits(low, low_bits, n_codes) if low_bits else codes
