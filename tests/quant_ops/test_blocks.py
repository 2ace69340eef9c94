"""Blocks, run one after the other, are the network."""

import pytest
import torch
from torch import nn

from quant_ops.blocks import split_into_blocks
from quant_ops.executor import Executor
from search.capture import trace


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.one(torch.relu(self.one(x))))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        first = self.two(torch.relu(self.one(x)))
        return first, self.three(torch.relu(first))


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 2)

    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(torch.relu(self.body(x)), 2)
        return self.head(y.reshape(x.shape[0], -1))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), Residual(4), Residual(4), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


NETWORKS = {
    "residual": (chain, (2, 3, 8, 8), [1, 2, 2, 1]),
    "shared": (Shared, (2, 4), [1, 1]),
    "two outputs": (TwoOutputs, (2, 4), [1, 1, 1]),
    "sized": (Sized, (2, 3, 8, 8), [1, 1]),
    "no layers": (lambda: nn.ReLU(), (2, 3), [0]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_run_one_after_the_other_are_the_network(name):
    make, shape, n_layers = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    traced = trace(make().eval(), (x,))
    blocks = split_into_blocks(traced.graph)
    assert [len(block.layers) for block in blocks] == n_layers
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, len(traced.graph.nodes))
    wanted, values = Executor(traced.graph).run(
        traced.params, (x,), keep=range(len(traced.graph.nodes))
    )
    for block in blocks:
        outputs = Executor(block.graph)(traced.params, [values[i] for i in block.sources])
        for output, target in zip(outputs, block.targets, strict=True):
            assert torch.equal(output, values[target])
    for output, expected in zip(outputs, wanted, strict=True):
        assert torch.equal(output, expected)


def test_a_clamp_stays_with_its_layer():
    traced = trace(chain().eval(), (torch.randn(2, 3, 8, 8),))
    for block in split_into_blocks(traced.graph)[:-1]:
        assert traced.graph.nodes[block.targets[0]].op == "relu.default"
