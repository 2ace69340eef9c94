"""Entropy-coded codes: lossless, never longer, near the entropy, refused where damaged."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant_ops.bit_widths import BIT_WIDTHS, LEVELS, code_bytes
from quant_ops.byte_stream import ByteReader
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.coded import coded_blob, read_coded_blob
from quant_ops.errors import UsageError, VerificationError
from quant_ops.packed import PackedModel, describe, pack, read, size_bytes
from quant_ops.packed_size import header
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.rans import (
    SYMBOLS_PER_LANE,
    TOTAL,
    decode,
    encode,
    frequencies_of,
    ideal_bits,
    lanes,
    table_of,
)
from quant_ops.testing import random_model
from search.capture import trace

WIDTHS = BIT_WIDTHS[1:]


def skewed(levels, n, seed=0, spread=8.0):
    values = np.random.default_rng(seed).normal(levels / 2, levels / spread, n)
    return np.clip(np.rint(values), 0, levels - 1).astype(np.uint8)


def round_trip(codes, width):
    blob = coded_blob(codes, width)
    reader = ByteReader(blob)
    assert np.array_equal(read_coded_blob(reader, width, codes.size), codes)
    assert reader.remaining == 0
    assert len(blob) <= 1 + code_bytes(width, codes.size)
    return blob


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 5, 431, 9216, 2 * SYMBOLS_PER_LANE - 1, 2 * SYMBOLS_PER_LANE + 3])
def test_codes_of_every_width_come_back_and_never_grow(width, n):
    levels = LEVELS[width]
    uniform = np.random.default_rng(1).integers(0, levels, n).astype(np.uint8)
    for codes in (skewed(levels, n), uniform, np.full(n, levels - 1, np.uint8)):
        round_trip(codes, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_many_lanes_give_what_few_lanes_give(width):
    levels = LEVELS[width]
    codes = skewed(levels, 33 * SYMBOLS_PER_LANE + 17)
    assert lanes(codes.size) == 33
    assert len(round_trip(codes, width)) < code_bytes(width, codes.size)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_codes_are_one_byte(width):
    assert round_trip(np.zeros(0, np.uint8), width) == b"\0"


@pytest.mark.parametrize("width", WIDTHS)
def test_one_symbol_alone_needs_no_words(width):
    blob = round_trip(np.full(5000, LEVELS[width] - 1, np.uint8), width)
    assert len(blob) < 40 + LEVELS[width]


def slow_decode(data, frequencies, n):
    """`FORMAT.md`, section 8, word for word, in exact integers."""
    k = max(1, n // 8192)
    states = [int.from_bytes(data[4 * j : 4 * j + 4], "little") for j in range(k)]
    rest = data[4 * k :]
    words = [int.from_bytes(rest[i : i + 2], "little") for i in range(0, len(rest), 2)]
    out = []
    for i in range(n):
        x = states[i % k]
        slot, first, symbol = x % 4096, 0, 0
        while slot >= first + frequencies[symbol]:
            first += frequencies[symbol]
            symbol += 1
        x = frequencies[symbol] * (x // 4096) + slot - first
        if x < 65536:
            x = 65536 * x + words.pop(0)
        states[i % k] = x
        out.append(symbol)
    assert states == [65536] * k
    assert not words
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_is_what_the_format_says(data):
    alphabet = data.draw(st.integers(1, 16))
    n = data.draw(st.one_of(st.integers(1, 300), st.just(2 * SYMBOLS_PER_LANE + 5)))
    weights = np.array(data.draw(st.lists(st.integers(0, 255), min_size=alphabet)))[:alphabet]
    if not weights.any():
        weights[0] = 1
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    symbols = generator.choice(alphabet, n, p=weights / weights.sum()).astype(np.uint8)
    frequencies = frequencies_of(table_of(np.bincount(symbols, minlength=alphabet)))
    stream = encode(symbols, frequencies)
    assert np.array_equal(decode(stream, frequencies, n), symbols)
    assert slow_decode(stream, frequencies.tolist(), n) == symbols.tolist()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WIDTHS), st.data())
def test_any_codes_come_back(width, data):
    top = LEVELS[width] - 1
    drawn = data.draw(st.lists(st.integers(0, top), max_size=40))
    round_trip(np.array(drawn * data.draw(st.integers(1, 60)), np.uint8), width)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=256))
def test_any_table_gives_frequencies_that_fill_the_slots(table):
    if not any(table):
        with pytest.raises(ValueError, match="no symbol"):
            frequencies_of(table)
        return
    frequencies = frequencies_of(table)
    assert frequencies.sum() == TOTAL
    assert [f > 0 for f in frequencies] == [b > 0 for b in table]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_stream_is_within_four_bytes_a_lane_of_its_table_and_that_within_a_percent_of_entropy(
    width,
):
    codes = skewed(LEVELS[width], 5 * SYMBOLS_PER_LANE)
    counts = np.bincount(codes, minlength=LEVELS[width])
    frequencies = frequencies_of(table_of(counts))
    ideal = ideal_bits(counts, frequencies) / 8
    share = counts[counts > 0] / codes.size
    entropy = -codes.size * float((share * np.log2(share)).sum()) / 8
    assert entropy <= ideal <= 1.01 * entropy + 1
    assert ideal <= len(encode(codes, frequencies)) <= 1.0005 * ideal + 4 * lanes(codes.size) + 2


def test_three_bit_codes_of_five_levels_cost_their_entropy():
    n = 36_864
    codes = np.repeat(np.arange(1, 6, dtype=np.uint8), [1, 2, 3, 2, 1]).repeat(n // 9 + 1)[:n]
    np.random.default_rng(0).shuffle(codes)
    assert len(round_trip(codes, 3)) < n * math.log2(5) / 8  # base-5 words at their limit


# whole files


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    return trace(net, (torch.randn(2, 3, 8, 8),))


def bell_shaped(model: QuantizedModel) -> QuantizedModel:
    """The model with codes bunched around the middle of their range."""
    layers = {}
    for name, layer in model.layers.items():
        width = np.asarray(layer.bit_widths)[:, None]
        spread = np.maximum(2.0**width / 8, 0.3)
        noise = np.random.default_rng(0).normal(0, spread, layer.codes.shape)
        top = np.where(width == 1.6, 1, 2 ** np.maximum(width - 1, 0) - 1)
        low = np.where(width == 1.6, -1, np.where(width == 0, 0, -top - 1))
        codes = np.clip(np.rint(noise), low, np.where(width == 0, 0, top)).astype(np.int16)
        layers[name] = QuantizedLayer(
            layer.bit_widths, codes, layer.scales, layer.mid_rise, layer.zero_points, layer.bias
        )
    return QuantizedModel(
        model.graph, model.candidate, layers, model.activations, model.float_params
    )


def model_of(*quants):
    traced = network()
    names = [layer.name for layer in traced.graph.searchable_layers]
    candidate = Candidate.of(dict(zip(names, quants, strict=True)))
    return traced, bell_shaped(random_model(traced.graph, traced.params, candidate))


MIXED = LayerQuant((3,) * 8 + (4,) * 8, "mid_tread")
PRUNED = LayerQuant((2,) * 7 + (0,) * 5, "mid_tread")


@pytest.mark.parametrize("quants", [(8, 3, 4), (PRUNED, 2, 8), (4, MIXED, 1.6), (1, 5, 6)])
def test_a_coded_file_holds_the_same_model_in_fewer_bytes(quants):
    _, model = model_of(*quants)
    plain, coded = (PackedModel.from_model(model, codec) for codec in ("plain", "entropy"))
    assert plain.size_bytes == size_bytes(model.graph, model.candidate) > coded.size_bytes
    assert (plain.codec, plain.version, coded.codec, coded.version) == ("plain", 1, "entropy", 2)
    for a, b in zip(plain.model.layers.values(), coded.model.layers.values(), strict=True):
        assert a.content() == b.content()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), coded(x))
    assert pack(coded.model, "entropy") == coded.data
    assert pack(coded.model) == plain.data


def test_a_model_that_gains_nothing_stays_a_plain_file_byte_for_byte():
    traced = network()
    names = [layer.name for layer in traced.graph.searchable_layers]
    candidate = Candidate.of(dict.fromkeys(names, 4))
    model = random_model(traced.graph, traced.params, candidate)  # every code equally often
    assert pack(model, "entropy") == pack(model)


def test_a_plain_file_is_what_it_was_before_there_was_a_codec():
    traced = network()
    names = [layer.name for layer in traced.graph.searchable_layers]
    candidate = Candidate.of({names[0]: 8, names[1]: 3, names[2]: 1.6})
    data = pack(random_model(traced.graph, {k: v * 0 for k, v in traced.params.items()}, candidate))
    assert hashlib.blake2b(data, digest_size=8).hexdigest() == "d03ef15221a656c9"


def test_an_unknown_codec_is_named(tmp_path):
    with pytest.raises(UsageError, match="must be one of plain, entropy, got 'zip'"):
        pack(model_of(8, 3, 4)[1], "zip")


def test_a_description_says_what_is_coded(tmp_path):
    PackedModel.from_model(model_of(8, 3, 4)[1], "entropy").save(tmp_path / "m.safetensors")
    facts = describe(tmp_path / "m.safetensors")
    assert (facts["codec"], facts["version"]) == ("entropy", 2)


# hostile files


def content_of(model):
    data = pack(model, "entropy")
    return data[8 + int.from_bytes(data[:8], "little") : -16]


def resealed(content):
    content = bytes(content)
    return header(len(content) + 16) + content + hashlib.blake2b(content, digest_size=16).digest()


CONTENT = content_of(model_of(8, 3, 4)[1])
SMALL = content_of(model_of(PRUNED, MIXED, 4)[1])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_hostile_coded_file_gives_an_error_or_a_model(data):
    mutated = bytearray(data.draw(st.sampled_from([CONTENT, SMALL])))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(5, len(mutated) - 1))
        action = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if action == "set":
            mutated[position] = data.draw(st.integers(0, 255))
        elif action == "insert":
            mutated[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del mutated[position : position + data.draw(st.integers(1, 8))]
    file = resealed(mutated)
    try:
        model = read(file)
    except VerificationError:
        return
    assert len(file) <= size_bytes(model.graph, model.candidate)


@pytest.mark.parametrize("n_kept", [6, 200, 1000, len(CONTENT) - 200, len(CONTENT) - 1])
def test_a_file_that_is_cut_short_is_refused(n_kept):
    with pytest.raises(VerificationError, match="damaged"):
        read(resealed(CONTENT[:n_kept]))


def test_a_version_that_the_layers_belie_is_refused():
    plain = bytearray(CONTENT)
    plain[4] = 1
    with pytest.raises(VerificationError, match="does not exist"):
        read(resealed(plain))
    data = pack(model_of(8, 3, 4)[1])
    content = bytearray(data[8 + int.from_bytes(data[:8], "little") : -16])
    content[4] = 2
    with pytest.raises(VerificationError, match="no layer is coded in a file of version 2"):
        read(resealed(content))


def stream_parts(n=1500):
    codes = skewed(8, n)
    return codes, bytearray(coded_blob(codes, 3))


def refused(blob, n=1500):
    with pytest.raises(VerificationError, match="damaged") as caught:
        read_coded_blob(ByteReader(bytes(blob)), 3, n)
    return str(caught.value)


def test_a_changed_stream_is_refused_since_the_states_do_not_end_where_they_began():
    _, blob = stream_parts()
    for position in range(1 + 8 + 2 + 2, len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        refused(changed)


def test_lying_streams_are_refused():
    _, blob = stream_parts()
    assert "mode 4" in refused(bytes([4]) + blob[1:])
    assert "all 0" in refused(blob[:1] + bytes(8) + blob[9:])
    assert "ends" in refused(blob[:-2]) or "wanted" in refused(blob[:-2])
    assert "does not end" in refused(blob[:11] + bytes(4) + blob[15:])  # a state below 2^16
    assert "longer" in refused(blob, n=100)
    assert "cannot be stored" in refused(blob, n=0)


def test_a_claim_of_many_codes_needs_bytes_before_memory():
    """Eight thousand codes need four bytes at least: a short file cannot ask for gigabytes."""
    _, blob = stream_parts()
    assert "are wanted" in refused(blob, n=2**40)
