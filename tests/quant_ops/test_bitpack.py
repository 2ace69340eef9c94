import itertools
import time

import numpy as np
import pytest

from quant_ops.bit_widths import BIT_WIDTHS, LEVELS, code_bytes
from quant_ops.bitpack import pack_bits, unpack_bits
from quant_ops.errors import VerificationError

STORED = [b for b in BIT_WIDTHS if b]


def slow_pack(codes, bit_width):
    if bit_width == 1.6:
        padded = list(codes) + [0] * (-len(codes) % 5)
        fives = [padded[i : i + 5] for i in range(0, len(padded), 5)]
        return bytes(sum(c * 3**i for i, c in enumerate(five)) for five in fives)
    number = sum(int(c) << (i * bit_width) for i, c in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bit_width // 8), "little")


@pytest.mark.parametrize("bit_width", STORED)
def test_every_code_at_every_position_packs_like_the_slow_oracle(bit_width):
    levels = LEVELS[bit_width]
    for n, position in itertools.product(range(1, 18), range(17)):
        if position < n:
            for code in range(levels):
                codes = np.zeros(n, np.int64)
                codes[position] = code
                packed = pack_bits(codes, bit_width)
                assert packed == slow_pack(codes, bit_width)
                assert np.array_equal(unpack_bits(packed, bit_width, n), codes)


@pytest.mark.parametrize("bit_width", STORED)
@pytest.mark.parametrize("n", [0, 1, 4, 5, 7, 8, 9, 63, 64, 65, 1001])
def test_random_codes_survive_packing(bit_width, n):
    codes = np.random.default_rng(n).integers(0, LEVELS[bit_width], n)
    packed = pack_bits(codes, bit_width)
    assert len(packed) == code_bytes(bit_width, n)
    assert packed == slow_pack([int(c) for c in codes], int(bit_width) if bit_width != 1.6 else 1.6)
    assert np.array_equal(unpack_bits(packed, bit_width, n), codes)


def test_every_five_trits_survive_packing():
    codes = np.array(list(itertools.product(range(3), repeat=5)))
    packed = pack_bits(codes, 1.6)
    assert sorted(packed) == list(range(243))
    assert np.array_equal(unpack_bits(packed, 1.6, codes.size), codes.reshape(-1))


@pytest.mark.parametrize("byte", range(243, 256))
def test_a_byte_that_is_not_five_trits_is_refused(byte):
    with pytest.raises(VerificationError, match="above 242"):
        unpack_bits(bytes([byte]), 1.6, 5)


@pytest.mark.parametrize("bit_width", [b for b in STORED if b != 8])
def test_unused_bits_that_are_set_are_refused(bit_width):
    packed = bytearray(pack_bits(np.zeros(9, np.uint8), bit_width))
    packed[-1] |= 128
    with pytest.raises(VerificationError, match="unused bits"):
        unpack_bits(bytes(packed), bit_width, 9)


@pytest.mark.parametrize(("n_bytes", "n_codes"), [(4, 8), (2, 8), (0, 1)])
def test_a_wrong_length_is_refused(n_bytes, n_codes):
    with pytest.raises(ValueError, match="fill"):
        unpack_bits(bytes(n_bytes), 3, n_codes)


@pytest.mark.parametrize("bit_width", [1.6, 3, 8])
def test_eleven_million_codes_take_well_under_a_second(bit_width):
    codes = np.random.default_rng(0).integers(
        0, 3 if bit_width == 1.6 else 2**bit_width, 11_000_000, np.uint8
    )
    start = time.process_time()
    packed = pack_bits(codes, bit_width)
    unpacked = unpack_bits(packed, bit_width, codes.size)
    seconds = time.process_time() - start
    assert np.array_equal(unpacked, codes)
    assert seconds < 2  # a busy machine; about 0.3 on an idle one
