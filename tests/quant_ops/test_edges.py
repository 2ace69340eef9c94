import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.edges import activation_edges, edge_of
from search.capture import trace


class Residual(nn.Module):
    """Two convolutions with an option-A shortcut: slice in space, zeros in channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.second(x) + shortcut)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_residual_network_has_one_edge_per_value_that_is_requantized() -> None:
    graph = trace(Residual(), (torch.zeros(2, 3, 8, 8),)).graph
    edges = activation_edges(graph)
    found = [(graph.nodes[graph.index_of[e.name]].op, e.kind) for e in edges]
    assert [kind for _, kind in found] == ["input", "inner", "inner", "inner", "inner", "output"]
    assert [op.split(".")[0] for op, _ in found][:4] == ["input", "conv2d", "conv2d", "add"]
    assert graph.nodes[edges[1].node].op == "relu.default"
    assert graph.nodes[edges[2].node].op == "conv2d.default"
    assert graph.nodes[edges[3].node].op == "relu.default"
    pad = next(i for i, n in enumerate(graph.nodes) if "pad" in n.op)
    assert edge_of(graph, pad) == edges[1].name


def test_edges_are_found_once_per_graph() -> None:
    graph = trace(Residual(), (torch.zeros(2, 3, 8, 8),)).graph
    assert activation_edges(graph) is activation_edges(graph)


class SharedRelu(nn.Module):
    """A convolution read twice: its relu cannot be fused and moves codes instead."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.softmax(F.relu(y) + y, 1)


def test_a_relu_that_is_not_the_only_reader_shares_the_edge_of_its_source() -> None:
    graph = trace(SharedRelu(), (torch.zeros(2, 2, 4),)).graph
    relu = next(i for i, n in enumerate(graph.nodes) if n.op == "relu.default")
    conv = next(i for i, n in enumerate(graph.nodes) if n.op.startswith("conv1d"))
    assert edge_of(graph, relu) == graph.nodes[conv].name
    assert [e.kind for e in activation_edges(graph)] == ["input", "inner", "inner", "output"]


class Pooled(nn.Module):
    """A maximum pool with indices, an embedding, and integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(torch.max(x, dim=1).values)


def test_integer_values_have_no_edge_and_the_maximum_keeps_the_edge_of_the_embedding() -> None:
    graph = trace(Pooled(), (torch.zeros(2, 6, dtype=torch.int64),)).graph
    edges = activation_edges(graph)
    assert edge_of(graph, 0) is None
    assert [graph.nodes[e.node].op.split(".")[0] for e in edges] == ["embedding", "linear"]
