import hashlib
import math
import os
import random

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.byte_stream import ByteReader
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.errors import EnvironmentFault, UsageError, VerificationError
from quant_ops.executor import Executor
from quant_ops.manifest import anonymous, decode_graph, encode_graph
from quant_ops.packed import PackedModel, describe, pack, read, size_bytes
from quant_ops.packed_size import header
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel, code_range
from quant_ops.storage import in_channels, plan_storage, scale_groups
from quant_ops.stored import StoredBias, StoredScale
from search.capture import trace


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.late = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.late(torch.relu(self.down(x) + short))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8),
            nn.Conv2d(8, 6, 1, groups=2), nn.GELU(approximate="tanh"),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("order", torch.arange(5))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x[:, self.order] + self.mix(self.norm(x))
        return self.head(x), torch.softmax(x, -1)


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.again = nn.ConvTranspose2d(6, 5, 3, stride=2)
        self.out = nn.Conv2d(5, 2, 3)

    def forward(self, x):
        return self.out(torch.relu(self.again(torch.relu(self.lift(x)))))


def chain():
    return nn.Sequential(
        nn.Conv2d(2, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 10), nn.Tanh(), nn.Linear(10, 3),
    )  # fmt: skip


def build():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 8)
    nets = {
        "chain": (chain(), torch.randn(2, 2, 8, 8)),
        "residual": (Residual(), image),
        "depthwise": (Depthwise(), image),
        "tied": (Tied(), torch.randint(0, 11, (2, 5))),
        "upsampling": (Upsampling(), torch.randn(2, 4, 3, 3)),
    }
    return {name: (trace(net, (x,)), x) for name, (net, x) in nets.items()}


NETS = build()


def random_quant(rng, layer):
    scheme = rng.choice(["auto", "mid_tread", "mid_rise", "affine"])
    group_size = rng.choice([None, None, rng.randint(1, layer.weights_per_channel)])
    kind = rng.random()
    if kind < 0.4:
        widths = (rng.choice(BIT_WIDTHS),)
    elif kind < 0.7:
        widths = tuple(rng.choice(BIT_WIDTHS) for _ in range(layer.out_channels))
    else:
        first, n = rng.choice(BIT_WIDTHS), rng.randrange(layer.out_channels)
        widths = (first,) * n + (rng.choice(BIT_WIDTHS),) * (layer.out_channels - n)
    return LayerQuant(widths, scheme, group_size)


def random_candidate(rng, graph):
    layers = {
        layer.name: random_quant(rng, layer)
        for layer in graph.searchable_layers
        if rng.random() < 0.85
    }
    edges = [node.name for node in graph.nodes if node.dtype == "float32" and node.op != "getitem"]
    chosen = [edge for edge in edges if rng.random() < 0.3]
    return Candidate.of(layers, {edge: rng.choice([2, 4, 8]) for edge in chosen})


def random_layer(generator, layer, quant):
    """Random codes, scales and biases; what `plan_storage` says is absent is random too."""
    widths = quant.per_channel(layer.out_channels)
    per_channel = np.asarray(widths)
    n_groups = scale_groups(layer, quant)
    codes = np.zeros((layer.out_channels, layer.weights_per_channel), np.int16)
    scales, offset = {}, set()
    for width in sorted(set(widths) - {0}):
        rows = np.flatnonzero(per_channel == width)
        low, high = code_range(width, quant.scheme)
        codes[rows] = generator.integers(low, high + 1, (len(rows), codes.shape[1]))
        scales[width] = StoredScale.nearest(generator.uniform(0.01, 1, (len(rows), n_groups)))
        if quant.scheme != "affine" and generator.random() < 0.5:
            offset.add(width)
    zero_points = None
    if quant.scheme == "affine":
        top = np.array([max(code_range(w, "affine")[1], 0) if w else 0 for w in widths])
        zero_points = generator.integers(0, top[:, None] + 1, (len(widths), n_groups))
        zero_points = zero_points.astype(np.int16)
    bias = None
    if layer.bias is not None:
        bias = StoredBias.nearest(generator.normal(size=layer.out_channels))
        bias.codes[per_channel == 0] = 0
    return QuantizedLayer(widths, codes, scales, frozenset(offset), zero_points, bias)


def random_model(traced, candidate, seed=0):
    generator = np.random.default_rng(seed)
    graph = traced.graph
    layers = {
        name: random_layer(generator, graph.layer_of[name], quant)
        for name, quant in candidate.layers
    }
    activations = {}
    for edge, bit_width in candidate.activations:
        signed = bool(generator.random() < 0.5)
        low, high = ActivationQuant(bit_width, signed, 1.0).code_range
        scale = float(np.float32(generator.uniform(0.01, 0.2)))
        zero = int(generator.integers(low, high + 1))
        activations[edge] = ActivationQuant(bit_width, signed, scale, zero)
    quantized = {graph.layer_of[n].weight for n in layers} | {
        graph.layer_of[n].bias for n in layers
    }
    floats = {name: t for name, t in traced.params.items() if name not in quantized}
    return QuantizedModel(graph, candidate, layers, activations, floats)


def assert_same_layer(storage, layer, mine, theirs):
    assert mine.bit_widths == theirs.bit_widths
    assert mine.mid_rise == theirs.mid_rise
    live = np.asarray(mine.bit_widths) != 0
    codes, read_codes = mine.codes[live], theirs.codes[live]
    columns = storage.columns.get(layer.name)
    if columns is not None:
        shape = (live.sum(), in_channels(layer), math.prod(layer.weight_shape[2:]))
        codes = codes.reshape(shape)[:, columns]
        read_codes = read_codes.reshape(shape)[:, columns]
    assert np.array_equal(codes, read_codes)
    assert not theirs.codes[~live].any()
    assert np.array_equal(mine.channel_scales(), theirs.channel_scales())
    if mine.zero_points is not None:
        assert np.array_equal(mine.zero_points[live], theirs.zero_points[live])
    if mine.bias is not None:
        assert np.array_equal(mine.bias_values(), theirs.bias_values())


def run(model, inputs):
    transforms = {
        model.graph.index_of[edge]: a.fake_quantize for edge, a in model.activations.items()
    }
    return Executor(model.graph).run(model.params(), inputs, transforms=transforms)[0]


def without_activations(candidate):
    return Candidate(candidate.layers)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", NETS)
def test_size_formula_equals_file_and_everything_reads_back(name, seed):
    traced, _ = NETS[name]
    candidate = random_candidate(random.Random(f"{name}{seed}"), traced.graph)
    model = random_model(traced, candidate, seed)
    data = pack(model)
    assert len(data) == size_bytes(traced.graph, candidate)
    back = read(data)
    assert back.graph == anonymous(traced.graph)
    storage = plan_storage(traced.graph, candidate)
    for number, layer in enumerate(traced.graph.layers):
        if layer.name in model.layers:
            theirs = back.layers[f"l{number}"]
            assert_same_layer(storage, layer, model.layers[layer.name], theirs)
    assert list(back.activations.values()) == [
        model.activations[edge] for edge, _ in candidate.activations
    ]
    assert [q for _, q in back.candidate.layers] == [
        candidate.assignment[layer.name]
        for layer in traced.graph.layers
        if layer.name in candidate.assignment
    ]
    assert pack(back) == data


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", NETS)
def test_packed_model_computes_what_the_model_computes(name, seed):
    traced, x = NETS[name]
    rng = random.Random(f"run{name}{seed}")
    candidate = random_candidate(rng, traced.graph)
    if seed % 2:  # removed channels leave exact zeros, which a zero point may not keep
        candidate = without_activations(candidate)
    else:
        assignment = candidate.assignment
        kept = {n: q for n, q in assignment.items() if 0 not in q.bit_widths}
        candidate = Candidate.of(kept, candidate.activation_bits)
    model = random_model(traced, candidate, seed)
    got = PackedModel.from_model(model)(x)
    for mine, theirs in zip(run(model, (x,)), got, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        if 0 not in {w for _, q in candidate.layers for w in q.bit_widths}:
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("n", [0, 1, 9, 10, 99, 100, 12345, 10**6])
def test_header_is_what_the_safetensors_library_writes(n):
    data = safetensors.numpy.save({"bitfront": np.zeros(n, np.uint8)})
    assert data == header(n) + bytes(n)


def test_the_safetensors_library_reads_the_file():
    traced, _ = NETS["residual"]
    candidate = Candidate.of({layer.name: 4 for layer in traced.graph.searchable_layers})
    data = pack(random_model(traced, candidate))
    tensors = safetensors.numpy.load(data)
    assert list(tensors) == ["bitfront"]
    assert data.endswith(tensors["bitfront"].tobytes())


@pytest.mark.parametrize("name", NETS)
def test_graph_survives_encoding(name):
    graph = NETS[name][0].graph
    reader = ByteReader(encode_graph(graph))
    assert decode_graph(reader) == anonymous(graph)
    assert reader.remaining == 0


def test_no_name_of_the_model_is_in_the_file():
    traced, _ = NETS["residual"]
    data = pack(random_model(traced, Candidate.of({}), 0))
    for name in ("stem", "head", "down", "weight", "conv", "relu"):
        assert name.encode() not in data


def full_model(name="residual", width=4):
    traced, x = NETS[name]
    candidate = Candidate.of({layer.name: width for layer in traced.graph.searchable_layers})
    return random_model(traced, candidate), x


def test_saved_file_loads_equal(tmp_path):
    model, x = full_model()
    packed = PackedModel.from_model(model)
    path = tmp_path / "m.safetensors"
    packed.save(path)
    loaded = PackedModel.load(path)
    assert path.stat().st_size == packed.size_bytes == loaded.size_bytes
    assert loaded.digest == packed.digest
    assert torch.equal(loaded(x)[0], packed(x)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    summary = describe(path)
    assert summary["size_bytes"] == packed.size_bytes
    assert summary["n_quantized_layers"] == len(model.layers)
    assert list(summary["channels_by_bit_width"]) == ["4"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    packed = PackedModel.from_model(full_model()[0])
    with pytest.raises(EnvironmentFault, match="nowhere"):
        packed.save(tmp_path / "nowhere" / "m.safetensors")


def test_a_failing_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    packed = PackedModel.from_model(full_model()[0])
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        packed.save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        PackedModel.load(tmp_path / "absent.safetensors")


def test_inputs_that_do_not_fit_are_a_usage_error():
    model, x = full_model()
    packed = PackedModel.from_model(model)
    with pytest.raises(UsageError, match="1 inputs"):
        packed(x, x)
    with pytest.raises(UsageError, match="3, 8, 8"):
        packed(x[:, :2])


def test_every_truncation_is_refused():
    data = pack(full_model("chain", 2)[0])
    for n in range(len(data)):
        with pytest.raises(VerificationError):
            read(data[:n])


def test_every_flipped_byte_is_refused():
    data = pack(full_model("chain", 1)[0])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(VerificationError):
            read(bytes(damaged))


def resealed(payload):
    return header(len(payload) + 16) + payload + hashlib.blake2b(payload, digest_size=16).digest()


def reread(payload, x):
    """Only a VerificationError or a valid model may result; running it must be as orderly."""
    try:
        packed = PackedModel.from_bytes(resealed(payload))
    except VerificationError:
        return
    assert read(packed.data).graph == packed.model.graph
    if (
        packed.model.graph.param_shapes
        and sum(torch.Size(shape).numel() for _, shape in packed.model.graph.param_shapes) < 10**6
    ):
        packed.model.params()


HOSTILE = []
for _name, _seed in [("residual", 3), ("depthwise", 5), ("tied", 1), ("upsampling", 2)]:
    _traced, _x = NETS[_name]
    _candidate = random_candidate(random.Random(_seed), _traced.graph)
    _data = pack(random_model(_traced, _candidate, _seed))
    HOSTILE.append((_data[8 + int.from_bytes(_data[:8], "little") : -16], _x))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_hostile_file_gives_an_error_or_a_model(data):
    payload, x = data.draw(st.sampled_from(HOSTILE))
    mutated = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        limit = data.draw(st.sampled_from([min(len(mutated), 400), len(mutated)]))
        position = data.draw(st.integers(5, limit - 1))
        action = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if action == "set":
            mutated[position] = data.draw(st.integers(0, 255))
        elif action == "insert":
            mutated[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del mutated[position : position + data.draw(st.integers(1, 8))]
    reread(bytes(mutated), x)


@pytest.mark.parametrize("name", ["magic", "version"])
def test_another_format_is_named(name):
    payload, _ = HOSTILE[0]
    changed = b"XXXX" + payload[4:] if name == "magic" else payload[:4] + b"\7" + payload[5:]
    with pytest.raises(VerificationError, match="mark" if name == "magic" else "version 7"):
        read(resealed(changed))
