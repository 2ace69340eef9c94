"""Codes in the fewest whole bytes: b bits each, lowest bit first, or five trits a byte."""

import numpy as np
from numpy.typing import NDArray

from quant_ops.bit_widths import TERNARY, TRITS_PER_BYTE, code_bytes
from quant_ops.errors import VerificationError

_POWERS = 3 ** np.arange(TRITS_PER_BYTE, dtype=np.uint8)
_LARGEST_TRIT_BYTE = 3**TRITS_PER_BYTE - 1
_TRITS = (np.arange(_LARGEST_TRIT_BYTE + 1)[:, None] // _POWERS % 3).astype(np.uint8)
_PER_WORD = 8  # eight codes of b bits fill exactly b bytes


def pack_bits(codes: NDArray[np.integer], bit_width: float) -> bytes:
    """Unsigned codes, any shape, in C order; unused bits of the last byte are 0.

    Code number i of width b occupies bits i b .. i b + b - 1, where bit n of the stream is bit
    n % 8 of byte n // 8. Ternary: byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4.

    >>> pack_bits(np.array([1, 2, 3]), 3).hex(), pack_bits(np.array([2, 2, 2, 2, 2]), 1.6).hex()
    ('d100', 'f2')

    Args:
        codes: values 0 .. 2^b - 1, or 0 .. 2 for ternary.
        bit_width: 1, 1.6 or 2..8.
    """
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    if bit_width == 8:
        return flat.tobytes()
    per_block = TRITS_PER_BYTE if bit_width == TERNARY else _PER_WORD
    blocks = np.zeros((-(-flat.size // per_block), per_block), np.uint8)
    blocks.reshape(-1)[: flat.size] = flat
    if bit_width == TERNARY:
        return (blocks @ _POWERS).tobytes()
    words = np.zeros(len(blocks), "<u8")
    for position in range(_PER_WORD):
        words |= blocks[:, position].astype("<u8") << np.uint64(position * int(bit_width))
    stream = words.view(np.uint8).reshape(-1, 8)[:, : int(bit_width)].tobytes()
    return stream[: code_bytes(bit_width, flat.size)]


def unpack_bits(data: bytes | memoryview, bit_width: float, n_codes: int) -> NDArray[np.uint8]:
    """The first `n_codes` codes, (n_codes,); inverse of `pack_bits`.

    Raises:
        ValueError: `data` is not as long as `n_codes` codes are.
        VerificationError: a byte above 242 where trits are stored, or unused bits that are not 0.
    """
    expected = code_bytes(bit_width, n_codes)
    if len(data) != expected:
        raise ValueError(
            f"{n_codes} codes of {bit_width:g} bits fill {expected} bytes, got {len(data)}"
        )
    stream = np.frombuffer(data, np.uint8)
    if bit_width == 8:
        return stream.copy()
    if bit_width == TERNARY:
        if stream.max(initial=0) > _LARGEST_TRIT_BYTE:
            raise VerificationError("a byte of ternary codes is above 242; the file is damaged")
        return _without_rest(_TRITS[stream].reshape(-1), n_codes)
    b = int(bit_width)
    padded = np.zeros((-(-n_codes // _PER_WORD), 8), np.uint8)
    whole, rest = divmod(stream.size, b)
    padded[:whole, :b] = stream[: whole * b].reshape(-1, b)
    if rest:
        padded[whole, :rest] = stream[whole * b :]
    words = padded.view("<u8").reshape(-1)
    codes = np.empty((len(words), _PER_WORD), np.uint8)
    mask = np.uint64(2**b - 1)
    for position in range(_PER_WORD):
        codes[:, position] = (words >> np.uint64(position * b)) & mask
    return _without_rest(codes.reshape(-1), n_codes)


def _without_rest(codes: NDArray[np.uint8], n_codes: int) -> NDArray[np.uint8]:
    if codes[n_codes:].any():
        raise VerificationError("unused bits after packed codes are not 0; the file is damaged")
    return codes[:n_codes]
