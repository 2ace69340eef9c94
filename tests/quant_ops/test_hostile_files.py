import hashlib
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from quant_ops.errors import VerificationError
from quant_ops.packed import pack, read, size_bytes
from quant_ops.packed_size import header
from quant_ops.testing import random_candidate, random_model
from search.capture import trace


def nets():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8),
        nn.Conv2d(8, 6, 1, groups=2), nn.GELU(approximate="tanh"),
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    text = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    flat = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 2))
    return [
        (conv, torch.randn(2, 3, 8, 8)),
        (text, torch.randint(0, 11, (2, 5))),
        (flat, torch.randn(2, 5)),
    ]


def payload(net, x, seed):
    traced = trace(net, (x,))
    candidate = random_candidate(random.Random(seed), traced.graph)
    data = pack(random_model(traced.graph, traced.params, candidate, seed))
    return data[8 + int.from_bytes(data[:8], "little") : -16]


def resealed(content):
    return header(len(content) + 16) + content + hashlib.blake2b(content, digest_size=16).digest()


def reread(content):
    """Only a VerificationError or a valid model may result."""
    data = resealed(content)
    try:
        model = read(data)
    except VerificationError:
        return
    assert size_bytes(model.graph, model.candidate) == len(data)
    if sum(math.prod(shape) for _, shape in model.graph.param_shapes) < 10**6:
        model.params()


PAYLOADS = [payload(net, x, seed) for seed, (net, x) in enumerate(nets())]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_hostile_file_gives_an_error_or_a_model(data):
    original = data.draw(st.sampled_from(PAYLOADS))
    mutated = bytearray(original)
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
    reread(bytes(mutated))


@pytest.mark.parametrize("name", ["magic", "version"])
def test_another_format_is_named(name):
    content = PAYLOADS[0]
    changed = b"XXXX" + content[4:] if name == "magic" else content[:4] + b"\7" + content[5:]
    with pytest.raises(VerificationError, match="mark" if name == "magic" else "version 7"):
        read(resealed(changed))
