"""Rows of weights as bytes: codes at their own width, rows of one width together."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.bit_widths import TERNARY, code_bytes
from quant_ops.bitpack import pack_bits
from quant_ops.program import WeightCodes
from quant_ops.quantized import QuantizedLayer, code_range
from quant_ops.runtime_mode import INT16_MAX, largest_pairs

BYTE_MAX = 255
TERNARY_KIND = 9  # how the kernels call a width that is no whole number of bits


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one width: weight = factor * code + addend, codes from 0.

    Attributes:
        kind: 0 (all weights are 0 and nothing is stored), 1..8 bits, or TERNARY_KIND.
        offset: of its first byte; every row starts at a whole byte.
    """

    kind: int
    n_rows: int
    factor: int
    addend: int
    row_bytes: int
    offset: int


@dataclass(frozen=True, eq=False)
class PackedRows:
    """All rows of one layer.

    Attributes:
        order: output channel of each row; rows are sorted by width.
        addends: one per row where they differ inside a block (affine codes), else empty.
        fits_int8: whether every weight lies in -128..127.
        depth: how many products of four taps with bytes of 0 to 255 can be summed pairwise in 16
            bits; 0: not even one, or not `fits_int8`.
    """

    blocks: tuple[Block, ...]
    data: bytes
    order: NDArray[np.int64]
    addends: tuple[int, ...]
    fits_int8: bool
    depth: int


def pack_rows(weights: WeightCodes, layer: QuantizedLayer) -> PackedRows:
    """Pack (rows, weights of a row); `layer` says at which width each row is stored."""
    widths = np.asarray(layer.bit_widths)
    order = np.argsort(widths, kind="stable")
    blocks: list[Block] = []
    data = bytearray()
    addends: list[int] = []
    for width in sorted(set(layer.bit_widths)):
        rows = order[widths[order] == width]
        if not width:
            blocks.append(Block(0, len(rows), 0, 0, 0, len(data)))
            addends += [0] * len(rows)
            continue
        factor, own = _offsets(layer, width, rows)
        codes = (weights[rows].astype(np.int64) - own[:, None]) // factor
        blocks.append(
            Block(
                TERNARY_KIND if width == TERNARY else int(width),
                len(rows),
                factor,
                int(own[0]),
                code_bytes(width, weights.shape[1]),
                len(data),
            )
        )
        addends += own.tolist()
        for row in codes:
            data += pack_bits(row, width)
    differs = layer.zero_points is not None
    fits = bool((weights >= -128).all() and (weights <= 127).all())
    pairs = BYTE_MAX * int(largest_pairs(weights).max(initial=1))
    return PackedRows(
        tuple(blocks),
        bytes(data),
        order,
        tuple(addends) if differs else (),
        fits,
        INT16_MAX // max(pairs, 1) if fits else 0,
    )


def _offsets(
    layer: QuantizedLayer, width: float, rows: NDArray[np.int64]
) -> tuple[int, NDArray[np.int64]]:
    """The factor of a width's codes, and what is added to each row's."""
    if layer.zero_points is not None:
        return 1, -layer.zero_points[rows, 0].astype(np.int64)
    lowest = code_range(width, "mid_tread")[0]
    if width in layer.mid_rise:
        return 2, np.full(len(rows), 2 * lowest + 1)
    return 1, np.full(len(rows), lowest)
