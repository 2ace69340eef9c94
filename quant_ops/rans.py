"""Static range asymmetric numeral systems: symbols in about their entropy [Duda2013].

`FORMAT.md`, section 8, is normative. Integers only, so that every reader and every machine agrees
to the bit. Symbols are dealt in turn to lanes, each with a state of its own; long streams have
many lanes, which are decoded side by side.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from quant_ops.errors import VerificationError

TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS  # sum of the frequencies
LOWEST_STATE = 1 << 16  # states lie in 2^16 .. 2^32 - 1 and move by words of 16 bits
SYMBOLS_PER_LANE = 8192  # a lane costs three bytes on average
STATE_BYTES, WORD_BYTES = 4, 2
_WORD_BITS, _WORD_MASK = 16, 0xFFFF
_MANY_LANES = 32  # from here on numpy is faster than a loop over integers
_MANTISSA = 16
_MAX_SHARE = 30 << 15  # what the largest byte of a table stands for


def lanes(n_symbols: int) -> int:
    """Number of states of a stream.

    >>> lanes(10), lanes(20_000)
    (1, 2)
    """
    return max(1, n_symbols // SYMBOLS_PER_LANE)


def table_of(counts: NDArray[np.int64]) -> bytes:
    """How often each symbol occurs, in one byte a symbol: a share with four bits of mantissa.

    0 is never; r + 1 stands for (16 + r mod 16) 2^(r div 16). At least one count is above 0.
    """
    wanted = counts * (_MAX_SHARE / counts.max())
    grid = _shares(np.arange(1, 256))
    nearest = np.abs(np.log(np.maximum(wanted, 1))[:, None] - np.log(grid)).argmin(axis=1) + 1
    return np.where(counts > 0, nearest, 0).astype(np.uint8).tobytes()


def frequencies_of(table: bytes | memoryview) -> NDArray[np.int64]:
    """Frequencies of the symbols, sum 4096, from a table.

    Each symbol with a share s > 0 gets 1 + floor(s (4096 - used) / sum of shares), with `used`
    the number of such symbols; what is then missing goes to the one of the largest share, the
    first of several.

    >>> frequencies_of(bytes([1, 0, 17])).tolist()
    [1365, 0, 2731]

    Raises:
        ValueError: no symbol has a share.
    """
    stored = np.frombuffer(table, np.uint8)
    shares = np.where(stored > 0, _shares(stored), 0)
    used = int(np.count_nonzero(shares))
    if not used:
        raise ValueError("no symbol has a share")
    frequencies = np.where(shares > 0, 1 + shares * (TOTAL - used) // int(shares.sum()), 0)
    frequencies[shares.argmax()] += TOTAL - int(frequencies.sum())
    return frequencies


def _shares(stored: NDArray[np.integer]) -> NDArray[np.int64]:
    r = np.maximum(stored.astype(np.int64) - 1, 0)
    shares: NDArray[np.int64] = (_MANTISSA + r % _MANTISSA) << (r // _MANTISSA)
    return shares


def ideal_bits(counts: NDArray[np.int64], frequencies: NDArray[np.int64]) -> float:
    """Sum over symbols of log2(4096 / frequency): the stream without its states."""
    used = counts > 0
    return float((counts[used] * (TOTAL_BITS - np.log2(frequencies[used]))).sum())


def encode(symbols: NDArray[np.uint8], frequencies: NDArray[np.int64]) -> bytes:
    """The states, then the words, of a stream: at most 4 bytes a lane above `ideal_bits`.

    Args:
        symbols: (n,); each has a frequency above 0.
        frequencies: (alphabet,), sum 4096.
    """
    starts = np.cumsum(frequencies) - frequencies
    encoder = _encode_wide if lanes(symbols.size) >= _MANY_LANES else _encode_narrow
    states, words = encoder(symbols, frequencies, starts)
    return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def _encode_narrow(
    symbols: NDArray[np.uint8], frequencies: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n_lanes = lanes(symbols.size)
    frequency_of, start_of = frequencies.tolist(), starts.tolist()
    states, words = [LOWEST_STATE] * n_lanes, []
    shift = 32 - TOTAL_BITS
    for i, symbol in zip(range(symbols.size - 1, -1, -1), symbols[::-1].tolist(), strict=True):
        state, frequency = states[i % n_lanes], frequency_of[symbol]
        if state >= frequency << shift:
            words.append(state & _WORD_MASK)
            state >>= _WORD_BITS
        whole, rest = divmod(state, frequency)
        states[i % n_lanes] = (whole << TOTAL_BITS) + rest + start_of[symbol]
    return np.array(states, np.int64), np.array(words[::-1], np.int64)


def _encode_wide(
    symbols: NDArray[np.uint8], frequencies: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n_lanes = lanes(symbols.size)
    states = np.full(n_lanes, LOWEST_STATE, np.int64)
    words: list[NDArray[np.int64]] = []
    for begin in range((symbols.size - 1) // n_lanes * n_lanes, -1, -n_lanes):
        row = symbols[begin : begin + n_lanes]
        frequency, state = frequencies[row], states[: row.size]
        full = state >= frequency << (32 - TOTAL_BITS)
        words.append(state[full][::-1] & _WORD_MASK)
        state = np.where(full, state >> _WORD_BITS, state)
        whole, rest = np.divmod(state, frequency)
        states[: row.size] = (whole << TOTAL_BITS) + rest + starts[row]
    return states, np.concatenate(words)[::-1]


def decode(
    data: bytes | memoryview, frequencies: NDArray[np.int64], n_symbols: int
) -> NDArray[np.uint8]:
    """Inverse of `encode`, (n_symbols,).

    Raises:
        VerificationError: `data` is not a stream of so many symbols with these frequencies.
    """
    n_lanes = lanes(n_symbols)
    if len(data) < STATE_BYTES * n_lanes or len(data) % WORD_BYTES:
        raise _fault()
    states = struct.unpack_from(f"<{n_lanes}I", data)
    words = np.frombuffer(data, "<u2", offset=STATE_BYTES * n_lanes)
    if min(states) < LOWEST_STATE:
        raise _fault()
    symbol_of = np.repeat(np.arange(len(frequencies), dtype=np.uint8), frequencies)
    # of slot s with symbol a: frequency of a, and s less the first slot of a
    frequency_of = frequencies[symbol_of]
    offset_of = np.arange(TOTAL) - (np.cumsum(frequencies) - frequencies)[symbol_of]
    decoder = _decode_wide if n_lanes >= _MANY_LANES else _decode_narrow
    return decoder(list(states), words, symbol_of, frequency_of, offset_of, n_symbols)


def _decode_narrow(
    states: list[int],
    words: NDArray[np.uint16],
    symbol_of: NDArray[np.uint8],
    frequency_of: NDArray[np.int64],
    offset_of: NDArray[np.int64],
    n_symbols: int,
) -> NDArray[np.uint8]:
    n_lanes, stream = len(states), iter(words.tolist())
    symbols, frequencies, offsets = symbol_of.tolist(), frequency_of.tolist(), offset_of.tolist()
    out = bytearray(n_symbols)
    for i in range(n_symbols):
        state = states[i % n_lanes]
        slot = state & (TOTAL - 1)
        out[i] = symbols[slot]
        state = frequencies[slot] * (state >> TOTAL_BITS) + offsets[slot]
        if state < LOWEST_STATE:
            word = next(stream, None)
            if word is None:
                raise _fault()
            state = state << _WORD_BITS | word
        states[i % n_lanes] = state
    if next(stream, None) is not None or any(state != LOWEST_STATE for state in states):
        raise _fault()
    return np.frombuffer(out, np.uint8)


def _decode_wide(
    states: list[int],
    words: NDArray[np.uint16],
    symbol_of: NDArray[np.uint8],
    frequency_of: NDArray[np.int64],
    offset_of: NDArray[np.int64],
    n_symbols: int,
) -> NDArray[np.uint8]:
    all_states = np.array(states, np.int64)
    n_lanes, used = len(states), 0
    out = np.empty(n_symbols, np.uint8)
    for begin in range(0, n_symbols, n_lanes):
        state = all_states[: n_symbols - begin]
        slot = state & (TOTAL - 1)
        out[begin : begin + n_lanes] = symbol_of[slot]
        state = frequency_of[slot] * (state >> TOTAL_BITS) + offset_of[slot]
        low = np.flatnonzero(state < LOWEST_STATE)
        if used + low.size > words.size:
            raise _fault()
        state[low] = state[low] << _WORD_BITS | words[used : used + low.size]
        used += low.size
        all_states[: state.size] = state
    if used != words.size or (all_states != LOWEST_STATE).any():
        raise _fault()
    return out


def _fault() -> VerificationError:
    return VerificationError("a coded stream does not end where its codes do; the file is damaged")
