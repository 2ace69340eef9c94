import math
import os
import random
import resource

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from quant_ops.byte_stream import ByteReader
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.errors import EnvironmentFault, UsageError, VerificationError
from quant_ops.executor import Executor
from quant_ops.manifest import anonymous, decode_graph, encode_graph
from quant_ops.packed import PackedModel, describe, pack, read, size_bytes
from quant_ops.packed_size import header
from quant_ops.reference import fake_quant_transforms
from quant_ops.storage import in_channels, plan_storage
from quant_ops.testing import random_candidate, random_model
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
    transforms = fake_quant_transforms(model)
    return Executor(model.graph).run(model.params(), inputs, transforms=transforms)[0]


def without_activations(candidate):
    return Candidate(candidate.layers)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", NETS)
def test_size_formula_equals_file_and_everything_reads_back(name, seed):
    traced, _ = NETS[name]
    candidate = random_candidate(random.Random(f"{name}{seed}"), traced.graph)
    model = random_model(traced.graph, traced.params, candidate, seed)
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
    model = random_model(traced.graph, traced.params, candidate, seed)
    got = PackedModel.from_model(model)(x)
    outputs = got if isinstance(got, tuple) else (got,)
    for mine, theirs in zip(run(model, (x,)), outputs, strict=True):
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
    data = pack(random_model(traced.graph, traced.params, candidate))
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
    data = pack(random_model(traced.graph, traced.params, Candidate.of({}), 0))
    for name in ("stem", "head", "down", "weight", "conv", "relu"):
        assert name.encode() not in data


def test_removed_channels_are_not_in_the_file_and_the_reduced_network_computes_the_same():
    traced, x = NETS["residual"]
    layers = {layer.name: LayerQuant((3,)) for layer in traced.graph.searchable_layers}
    whole = size_bytes(traced.graph, Candidate.of(layers))
    layers["one"] = LayerQuant((3, 0, 3, 0, 0, 4, 3, 3))
    candidate = Candidate.of(layers)
    model = random_model(traced.graph, traced.params, candidate)
    packed = PackedModel.from_model(model)
    two = traced.graph.layer_of["two"]
    columns_gone = 3 * 9 * two.out_channels * 3 // 8
    assert packed.size_bytes < whole - columns_gone - 3 * (27 + 3) // 8
    graph, params = packed.reduced()
    smaller = {layer.weight_shape for layer in graph.layers}
    assert {(5, 8, 3, 3), (8, 5, 3, 3)} <= smaller
    assert all(tuple(params[layer.weight].shape) == layer.weight_shape for layer in graph.layers)
    torch.testing.assert_close(packed(x), run(model, (x,))[0], rtol=1e-4, atol=1e-5)


def full_model(name="residual", width=4):
    traced, x = NETS[name]
    candidate = Candidate.of({layer.name: width for layer in traced.graph.searchable_layers})
    return random_model(traced.graph, traced.params, candidate), x


def test_saved_file_loads_equal(tmp_path):
    model, x = full_model()
    packed = PackedModel.from_model(model)
    path = tmp_path / "m.safetensors"
    packed.save(path)
    loaded = PackedModel.load(path)
    assert path.stat().st_size == packed.size_bytes == loaded.size_bytes
    assert loaded.digest == packed.digest
    assert torch.equal(loaded(x), packed(x))
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


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    packed = PackedModel.from_model(full_model()[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (packed.size_bytes - 1, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match="cannot write the packed model"):
            packed.save(tmp_path / "m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


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
