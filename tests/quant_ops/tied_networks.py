"""Networks whose channels are tied in every way, and candidates that remove some of them."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import tied_channels
from quant_ops.graph import Graph
from search.capture import Traced, trace


def conv_norm(n_in: int, n_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv_norm(3, 6), conv_norm(6, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.hidden, self.head = nn.Linear(5 * 4 * 4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = F.relu(self.up(F.gelu(self.two(x))))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class PadBlock(nn.Module):
    """Residual block with the parameter-free shortcut: every second pixel, zero channels around."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.one, self.two = conv_norm(n_in, n_out, stride=stride), conv_norm(n_out, n_out)
        self.stride, self.extra = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x)))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class PadResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 4)
        self.blocks = nn.Sequential(
            PadBlock(4, 4, 1), PadBlock(4, 8, 2), PadBlock(8, 8, 1), PadBlock(8, 16, 2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class ProjectionBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.one, self.two = conv_norm(n_in, n_out, stride=stride), conv_norm(n_out, n_out)
        self.project = conv_norm(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.project(x))


class ProjectionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 4)
        self.blocks = nn.Sequential(ProjectionBlock(4, 4, 1), ProjectionBlock(4, 8, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 1).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.expand, self.depth = conv_norm(n_in, 6, 1), conv_norm(6, 6, 3, stride, groups=6)
        self.squeeze, self.gate = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.project = conv_norm(6, n_out, 1)
        self.shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depth(F.relu6(self.expand(x))))
        y = y * torch.sigmoid(self.gate(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.project(y)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 4)
        self.blocks = nn.Sequential(
            InvertedResidual(4, 4, 1), InvertedResidual(4, 8, 2), InvertedResidual(8, 8, 1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.hardswish(self.stem(x))).mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.narrow = nn.ModuleList(conv_norm(4 + 2 * i, 4, 1) for i in range(3))
        self.grow = nn.ModuleList(nn.Conv2d(4, 2, 3, padding=1) for _ in range(3))
        self.plain = nn.Conv2d(10, 3, 1)
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, narrow, grow in zip(self.norms, self.narrow, self.grow, strict=True):
            y = grow(F.relu(narrow(F.relu(norm(x)))))
            x = torch.cat([x, y], 1)
        x = torch.cat([self.plain(x), x], 1)
        return self.head(x.mean((2, 3)))


class Splits(nn.Module):
    """Slices, splits, pads, flips, shuffles and scales along the channel axis."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale, self.slope = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.PReLU(8)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.small, self.head = nn.Conv2d(8, 4, 1), nn.Linear(8, 5)
        self.shared = nn.Linear(8, 8)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.slope(self.one(x)).chunk(2, 1)
        c, d = torch.split(F.relu(self.two(torch.cat([b, a], 1)) * self.scale), [3, 5], 1)
        e = torch.cat([F.pad(a[:, ::2], (1, 1, 1, 1, 1, 0)), F.pad(b[:, 1:3], (1, 1, 1, 1))], 1)
        y = torch.cat([c, d, self.small(torch.cat([c, d], 1))], 1)
        y = self.grouped(y)
        z = self.shuffle(F.relu(y)).flip(1)
        z = F.pixel_shuffle(z, 2)
        y = torch.cat([z.mean((2, 3)), y.mean((2, 3))[:, 1:7]], 1)
        y = self.shared(F.relu(self.shared(y)))
        return self.head(y) + e.mean((1, 2, 3)).unsqueeze(1)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 9), nn.BatchNorm1d(9), nn.ReLU(),
            nn.Linear(9, 7), nn.LeakyReLU(), nn.Linear(7, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.block(x).mean(1))


class Language(nn.Module):
    """Input and output share one table; a position table is added."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 4, 1)
        self.memory, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.memory(self.two(F.relu(self.one(x))).transpose(1, 2))
        return self.head(y[:, -1])


class TwoInputs(nn.Module):
    """A grouped transposed convolution, three dimensions, two inputs, three outputs."""

    def __init__(self):
        super().__init__()
        self.one, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 2, 2, groups=2)
        self.cube, self.scale = nn.Conv3d(1, 4, 3), nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.left, self.right = nn.Linear(8, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        y = self.up(F.relu(self.one(x)) * self.scale)
        z = self.right(F.relu(self.cube(z)).mean((2, 3, 4)))
        return self.left(y.amax((2, 3))), z * 2, F.relu(z)


ODD_NETWORKS = [
    (Language, (torch.arange(12).reshape(2, 6) % 11,), {"up": 16}),
    (Recurrent, (torch.randn(2, 3, 12),), {"one": 6}),
    (
        TwoInputs,
        (torch.randn(2, 3, 8, 8), torch.randn(2, 1, 5, 5, 5)),
        {"cube": 4, "one": 6, "up": 8},
    ),
]
NETWORKS = [
    Chain, PadResNet, ProjectionResNet, MobileNet, DenseNet, Splits, Perceptron, Transformer,
]  # fmt: skip


def make(network: type[nn.Module]) -> Traced:
    torch.manual_seed(0)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return trace(model, (torch.randn(2, 3, 8, 8),))


def candidate_without(graph: Graph, zeros: dict[str, set[int]]) -> Candidate:
    layers = {
        layer.name: LayerQuant(
            tuple(0 if i in zeros.get(layer.name, ()) else 4 for i in range(layer.out_channels))
        )
        for layer in graph.searchable_layers
    }
    return Candidate.of(layers)


def draw_zeros(traced: Traced, data: st.DataObject) -> dict[str, set[int]]:
    """A few sets of ties in full, plus a few single channels."""
    ties = [t for t in tied_channels(traced.graph) if t.removable]
    zeros: dict[str, set[int]] = {}
    chosen = data.draw(st.lists(st.sampled_from(ties), unique=True, max_size=len(ties)))
    searchable = {layer.name: layer for layer in traced.graph.searchable_layers}
    names = data.draw(st.lists(st.sampled_from(sorted(searchable)), max_size=3))
    singles = [(n, data.draw(st.integers(0, searchable[n].out_channels - 1))) for n in names]
    for name, channel in [c for tie in chosen for c in tie.channels] + singles:
        zeros.setdefault(name, set()).add(channel)
    return zeros
