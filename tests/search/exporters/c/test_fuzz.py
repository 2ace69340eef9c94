"""Random small networks under random assignments: every output integer is the referee's."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c_networks import Case, assert_equal_to_referee
from small_networks import random_packed
from torch import Tensor, nn

pytestmark = pytest.mark.compiled


class RandomNet(nn.Module):
    """Convolutions of any stride, padding, dilation and groups, with bypasses, pools and a head."""

    def __init__(self, rng: np.random.Generator, channels: int, size: int) -> None:
        super().__init__()
        self.plan: list[tuple[str, int]] = []
        self.body = nn.ModuleList()
        for _ in range(int(rng.integers(1, 5))):
            groups = int(rng.choice([g for g in (1, 1, 1, 2, 4, channels) if channels % g == 0]))
            out = groups * int(rng.integers(1, 1 + max(1, 20 // groups)))
            kernel = int(rng.integers(1, 4))
            dilation = int(rng.integers(1, 3)) if kernel * 2 <= size else 1
            conv = nn.Conv2d(
                channels, out, kernel, int(rng.integers(1, 3)), int(rng.integers(0, kernel)),
                dilation, groups, bool(rng.integers(2)),
            )  # fmt: skip
            kind = str(
                rng.choice(["plain", "relu", "bypass", "join", "max", "average", "shortcut"])
            )
            pad = conv.padding[0]
            new = (size + 2 * int(pad) - dilation * (kernel - 1) - 1) // conv.stride[0] + 1
            if new < 2:
                break
            self.body.append(conv)
            same = out == channels and new == size
            if (kind == "bypass" and not same) or (kind == "join" and new != size):
                kind = "relu"
            if kind == "shortcut" and (
                out < channels or conv.stride[0] != 2 or new != -(-size // 2)
            ):
                kind = "relu"
            self.plan.append((kind, out - channels))
            channels, size = out + (channels if kind == "join" else 0), new
            if kind in ("max", "average"):
                size //= 2
            if size < 2:
                break
        self.pools = bool(rng.integers(2))
        self.head = nn.Linear(
            channels * (1 if self.pools else size * size), int(rng.integers(1, 9))
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv, (kind, wider) in zip(self.body, self.plan, strict=True):
            y = conv(x)
            if kind == "bypass":
                y = F.relu(y + x)
            elif kind == "join":
                y = torch.cat([F.relu(y), x], 1)
            elif kind == "shortcut":
                y = F.relu(
                    y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, wider // 2, wider - wider // 2))
                )
            elif kind != "plain":
                y = F.relu(y)
            if kind == "max":
                y = F.max_pool2d(y, 2)
            elif kind == "average":
                y = F.avg_pool2d(y, 2)
            x = y
        return self.head(x.mean((2, 3)) if self.pools else x.flatten(1))


def case(seed: int) -> Case:
    """A network, its assignment and four inputs."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, size = int(rng.integers(1, 9)), int(rng.integers(5, 12))
    x = torch.randn(4, channels, size, size)
    bits = (8,) if rng.random() < 0.7 else (3, 5, 8, 16)
    return random_packed(RandomNet(rng, channels, size), (x,), seed, activation_bits=bits), (x,)


def test_thirty_random_networks(tmp_path: Path) -> None:
    assert_equal_to_referee([case(seed) for seed in range(8)], tmp_path / "x86")
    assert_equal_to_referee([case(seed) for seed in range(8, 30)], tmp_path / "portable", levels=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(30, 330, 50))
def test_three_hundred_random_networks(first: int, tmp_path: Path) -> None:
    assert_equal_to_referee([case(seed) for seed in range(first, first + 50)], tmp_path)
