"""Codes, scales, biases and float parameters as bytes, and back.

`FORMAT.md`, sections 4 to 6, is normative.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bit_widths import BIT_WIDTHS, code_bytes
from quant_ops.bitpack import unpack_bits
from quant_ops.byte_stream import ByteReader, put_varint
from quant_ops.candidate import SCHEMES, LayerQuant
from quant_ops.coded import LayerCodes, read_coded_blob, rows_of
from quant_ops.graph import Layer
from quant_ops.layout import from_canonical, to_canonical
from quant_ops.quantized import ActivationQuant, QuantizedLayer, code_range
from quant_ops.storage import (
    FloatParam,
    canonical_shape,
    float_bytes,
    in_channels,
    kept_weights,
    nibble_bytes,
    run_bytes,
    runs,
    scale_groups,
    width_counts,
)
from quant_ops.stored import StoredBias, StoredScale

_FLOAT, _UNIFORM, _RUNS, _NIBBLES = range(4)
_HAS_GROUP_SIZE = 16
_CODED = 32
_MID_RISE = 16
_SIGNED = 128
_MAX_ACTIVATION_BITS = 16
_MAX_SCALE = 2.0**64  # codes times scales stay finite in float32


def put_quant(
    out: bytearray, quant: LayerQuant | None, mid_rise: frozenset[float], coded: bool = False
) -> None:
    """Append one layer's entry in the quantization table."""
    if quant is None:
        out.append(_FLOAT)
        return
    widths = [BIT_WIDTHS.index(width) for width in quant.bit_widths]
    form = _UNIFORM
    if quant.uniform is None:
        shorter = run_bytes(quant.bit_widths) < nibble_bytes(quant.bit_widths)
        form = _RUNS if shorter else _NIBBLES
    grouped = _HAS_GROUP_SIZE * (quant.group_size is not None)
    out.append(form | SCHEMES.index(quant.scheme) << 2 | grouped | _CODED * coded)
    if quant.group_size is not None:
        put_varint(out, quant.group_size)
    if form == _UNIFORM:
        out.append(widths[0] | _MID_RISE * (quant.bit_widths[0] in mid_rise))
        return
    out += struct.pack("<H", sum(1 << BIT_WIDTHS.index(width) for width in mid_rise))
    if form == _RUNS:
        pieces = runs(quant.bit_widths)
        put_varint(out, len(pieces))
        for width, n in pieces:
            out.append(BIT_WIDTHS.index(width))
            put_varint(out, n)
    else:
        widths += [0] * (len(widths) % 2)
        out += bytes(a | b << 4 for a, b in zip(widths[::2], widths[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class QuantEntry:
    """One layer's entry: its widths (None: float), those with a half-step offset, coded or not."""

    quant: LayerQuant | None
    mid_rise: frozenset[float] = frozenset()
    coded: bool = False


def read_quant(reader: ByteReader, layer: Layer, *, may_be_coded: bool = False) -> QuantEntry:
    """Inverse of `put_quant`; only files of version 2 have coded layers."""
    head = reader.byte()
    form = head & 3
    if form == _FLOAT and head == 0:
        return QuantEntry(None)
    limit = 2 * _CODED if may_be_coded else _CODED
    if form == _FLOAT or head >= limit or not layer.searchable:
        raise reader.fault(f"quantization {head:#04x} of a layer does not exist")
    group_size = reader.varint(2**40) if head & _HAS_GROUP_SIZE else None
    if group_size == 0:
        raise reader.fault("a group of weights is empty")
    if form == _UNIFORM:
        byte = reader.byte()
        mask = (byte >> 4) << (byte & 15)
        if byte >= 32:
            raise reader.fault(f"bit width {byte:#04x} does not exist")
        bit_widths = _widths(reader, [byte & 15])
    else:
        (mask,) = struct.unpack("<H", reader.take(2))
        indices = (_read_runs if form == _RUNS else _read_nibbles)(reader, layer.out_channels)
        bit_widths = _widths(reader, indices)
        shorter = _RUNS if run_bytes(bit_widths) < nibble_bytes(bit_widths) else _NIBBLES
        if len(set(bit_widths)) == 1 or form != shorter:
            raise reader.fault("a map of bit widths is not written in the shortest form")
    mid_rise = frozenset(w for i, w in enumerate(BIT_WIDTHS) if mask >> i & 1)
    if mask >> len(BIT_WIDTHS) or not mid_rise <= set(bit_widths):
        raise reader.fault("a half-step offset is set for a width that no channel has")
    quant = LayerQuant(bit_widths, SCHEMES[head >> 2 & 3], group_size)
    return QuantEntry(quant, mid_rise, bool(head & _CODED))


def _read_runs(reader: ByteReader, n_channels: int) -> list[int]:
    indices: list[int] = []
    for _ in range(reader.count()):
        index = reader.byte()
        indices += [index] * reader.varint(n_channels - len(indices) + 1)
    if len(indices) != n_channels:
        raise reader.fault(f"a width map covers {len(indices)} of {n_channels} channels")
    return indices


def _read_nibbles(reader: ByteReader, n_channels: int) -> list[int]:
    data = reader.take(-(-n_channels // 2))
    both = [index for byte in data for index in (byte & 15, byte >> 4)]
    if any(both[n_channels:]):
        raise reader.fault("the unused half byte of a width map is not 0")
    return both[:n_channels]


def _widths(reader: ByteReader, indices: list[int]) -> tuple[float, ...]:
    if max(indices) >= len(BIT_WIDTHS):
        raise reader.fault(f"bit width number {max(indices)} does not exist")
    return tuple(BIT_WIDTHS[index] for index in indices)


def put_layer(
    out: bytearray,
    layer: Layer,
    quant: LayerQuant,
    quantized: QuantizedLayer,
    codes: LayerCodes,
) -> None:
    """Append one layer's scales, zero points, codes and bias."""
    per_channel = np.asarray(quant.per_channel(layer.out_channels))
    n_groups = scale_groups(layer, quant)
    for width, n in width_counts(layer, quant).items():
        rows = rows_of(per_channel, width)
        scale = quantized.scales[width]
        assert scale.ratio.shape == (n, n_groups), layer.name
        out += struct.pack("<f", scale.base) + scale.ratio.tobytes()
        if quant.scheme == "affine":
            assert quantized.zero_points is not None, layer.name
            zeros = quantized.zero_points[rows]
            assert zeros.shape == (n, n_groups), layer.name
            assert zeros.min() >= 0, layer.name
            assert zeros.max() <= 255, layer.name
            out += zeros.astype(np.uint8).tobytes()
        out += codes.blobs[width]
    live_rows = per_channel != 0
    assert (quantized.bias is None) == (layer.bias is None), layer.name
    if quantized.bias is not None and live_rows.any():
        out += struct.pack("<f", quantized.bias.base)
        out += quantized.bias.codes[live_rows].astype("<i2").tobytes()


def read_layer(
    reader: ByteReader,
    layer: Layer,
    entry: QuantEntry,
    columns: NDArray[np.intp] | None,
) -> QuantizedLayer:
    """Inverse of `put_layer`; codes of absent columns stand for zero, absent rows are 0."""
    quant = entry.quant
    assert quant is not None, layer.name
    bit_widths = quant.per_channel(layer.out_channels)
    per_channel = np.asarray(bit_widths)
    n_groups = scale_groups(layer, quant)
    affine = quant.scheme == "affine"
    codes = np.zeros((layer.out_channels, layer.weights_per_channel), np.int16)
    zero_points = np.zeros((layer.out_channels, n_groups), np.int16) if affine else None
    scales = {}
    n_kept, stored_bytes, plain_bytes = kept_weights(layer, columns), 0, 0
    for width, n in width_counts(layer, quant).items():
        rows = rows_of(per_channel, width)
        base = _read_finite(reader)
        ratio = np.frombuffer(reader.take(n * n_groups), np.uint8).reshape(n, n_groups).copy()
        scales[width] = StoredScale(base, ratio)
        if zero_points is not None:
            zeros = np.frombuffer(reader.take(n * n_groups), np.uint8).reshape(n, n_groups)
            zero_points[rows] = zeros
            per_group = layer.weights_per_channel // n_groups
            codes[rows] = np.repeat(zero_points[rows], per_group, axis=1)
        start = reader.position
        found = _read_codes(reader, width, n * n_kept, coded=entry.coded)
        stored_bytes += reader.position - start
        plain_bytes += code_bytes(width, n * n_kept)
        low = code_range(width, quant.scheme)[0]
        stored = found.astype(np.int16) + np.int16(low)
        _place(layer, codes, rows, columns, stored.reshape(n, n_kept))
    if entry.coded and stored_bytes >= plain_bytes:
        raise reader.fault("a coded layer is no shorter than a plain one")
    bias = _read_bias(reader, per_channel != 0) if layer.bias is not None else None
    return QuantizedLayer(bit_widths, codes, scales, entry.mid_rise, zero_points, bias)


def _read_codes(
    reader: ByteReader, bit_width: float, n_codes: int, *, coded: bool
) -> NDArray[np.uint8]:
    if coded:
        return read_coded_blob(reader, bit_width, n_codes)
    return unpack_bits(reader.take(code_bytes(bit_width, n_codes)), bit_width, n_codes)


def _place(
    layer: Layer,
    codes: NDArray[np.int16],
    rows: slice | NDArray[np.intp],
    columns: NDArray[np.intp] | None,
    stored: NDArray[np.int16],
) -> None:
    if columns is None:
        codes[rows] = stored
        return
    n_in = in_channels(layer)
    kernel = layer.weights_per_channel // n_in
    full = codes[rows].reshape(len(stored), n_in, kernel)
    full[:, columns] = stored.reshape(len(stored), len(columns), kernel)
    codes[rows] = full.reshape(len(stored), -1)


def _read_bias(reader: ByteReader, live: NDArray[np.bool_]) -> StoredBias:
    codes = np.zeros(len(live), np.int16)
    if not live.any():
        return StoredBias(np.float32(1.0), codes)
    base = _read_finite(reader)
    codes[live] = np.frombuffer(reader.take(2 * int(live.sum())), "<i2")
    return StoredBias(base, codes)


def _read_finite(reader: ByteReader) -> np.float32:
    (value,) = reader.unpack("<f")
    if not 0 < value < _MAX_SCALE:
        raise reader.fault(f"a scale is {value}, not a positive number below 2^64")
    return np.float32(value)


def put_activation(out: bytearray, index: int, activation: ActivationQuant) -> None:
    """Append the quantizer of the value of node `index`."""
    assert 1 <= activation.bit_width <= _MAX_ACTIVATION_BITS
    low, high = activation.code_range
    assert low <= activation.zero_point <= high
    put_varint(out, index)
    out.append(activation.bit_width | _SIGNED * activation.signed)
    out += struct.pack("<fH", activation.scale, activation.zero_point - low)


def read_activation(reader: ByteReader, n_nodes: int) -> tuple[int, ActivationQuant]:
    """Inverse of `put_activation`."""
    index = reader.varint(n_nodes)
    byte = reader.byte()
    bit_width = byte & ~_SIGNED
    if not 1 <= bit_width <= _MAX_ACTIVATION_BITS:
        raise reader.fault(f"activations cannot have {bit_width} bits")
    scale = float(_read_finite(reader))
    (above_low,) = struct.unpack("<H", reader.take(2))
    if above_low >> bit_width:
        raise reader.fault(f"zero point {above_low} is outside {bit_width} bits")
    unsigned = ActivationQuant(bit_width, bool(byte & _SIGNED), scale)
    low = unsigned.code_range[0]
    return index, ActivationQuant(bit_width, unsigned.signed, scale, low + int(above_low))


def put_float(out: bytearray, param: FloatParam, tensor: Tensor) -> None:
    """Append what is kept of a float parameter, in its own type."""
    assert str(tensor.dtype) == f"torch.{param.dtype}", (param.name, tensor.dtype)
    assert tuple(tensor.shape) == param.shape, (param.name, tensor.shape)
    kept = to_canonical(param.layer, tensor) if param.layer else tensor
    for axis, positions in param.kept.items():
        kept = kept.index_select(axis, torch.from_numpy(positions).to(kept.device))
    out += kept.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_float(reader: ByteReader, param: FloatParam) -> Tensor:
    """Inverse of `put_float`; absent entries are 0."""
    dtype: torch.dtype = getattr(torch, param.dtype)
    data = reader.take(float_bytes(param))
    if param.dtype == "bool" and data and max(data) > 1:
        raise reader.fault("a truth value is neither 0 nor 1")
    flat = torch.zeros(len(data) // dtype.itemsize, dtype=dtype)
    flat.view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    if not param.kept:
        return flat.reshape(param.shape)
    canonical = canonical_shape(param.layer) if param.layer else param.shape
    full = torch.zeros(canonical, dtype=dtype)
    ((axis, positions),) = param.kept.items()
    kept_shape = [len(positions) if i == axis else n for i, n in enumerate(canonical)]
    full.index_copy_(axis, torch.from_numpy(positions), flat.reshape(kept_shape))
    return from_canonical(param.layer, full).contiguous() if param.layer else full
