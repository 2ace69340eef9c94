import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import (
    bypassed_layers,
    live_inputs,
    tied_channels,
    zero_channels,
)
from quant_ops.graph import Graph
from quant_ops.removal import plan_removal, remove_channels
from search.capture import trace


def traced_graph(model: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace(model, (torch.randn(2, 3, 8, 8),)).graph


def ties_of(graph: Graph) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(tie.channels) for tie in tied_channels(graph) if tie.removable}


class PadShortcut(nn.Module):
    """Two convolutions joined by an option-A shortcut: 4 channels, 2 zero channels around."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.block(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(x).mean((2, 3)))


def test_a_padded_shortcut_shifts_the_channels_it_ties():
    shifted = {frozenset({("stem", i), ("block", i + 2)}) for i in range(4)}
    alone = {frozenset({("block", i)}) for i in (0, 1, 6, 7)}
    assert ties_of(traced_graph(PadShortcut())) == shifted | alone


def test_a_shortcut_keeps_a_channel_alive_and_both_zero_kill_it():
    graph = traced_graph(PadShortcut())
    one = Candidate.of({"block": LayerQuant((0, 4, 0, 4, 4, 4, 4, 4)), "stem": 4})
    assert np.flatnonzero(~live_inputs(graph, one)["head"]).tolist() == [0]
    both = one.replace({"stem": LayerQuant((0, 4, 4, 4))})
    assert np.flatnonzero(~live_inputs(graph, both)["head"]).tolist() == [0, 2]
    assert np.flatnonzero(~live_inputs(graph, both)["block"]).tolist() == [0]
    assert zero_channels(graph, both) == {"block": frozenset({0, 2}), "stem": frozenset({0})}


def test_removal_names_rows_and_columns():
    graph = traced_graph(PadShortcut())
    widths = {"block": LayerQuant((0, 4, 0, 0, 4, 4, 4, 4)), "stem": LayerQuant((0, 4, 4, 0))}
    removal = plan_removal(graph, Candidate.of(widths))
    assert {n: k.tolist() for n, k in removal.rows.items()} == {
        "stem": [1, 2, 3],
        "block": [1, 3, 4, 5, 6, 7],
    }
    assert {n: k.tolist() for n, k in removal.columns.items()} == {
        "block": [1, 2, 3],
        "head": [1, 3, 4, 5, 6, 7],
    }


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, 4, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.relu(self.conv(x)), 1))


def test_a_flattened_channel_is_a_run_of_columns():
    removal = plan_removal(traced_graph(Flattened()), Candidate.of({"conv": LayerQuant((4, 0, 4))}))
    assert removal.columns["head"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert "head" not in removal.rows


class Activated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize(
    "function",
    [
        F.relu6, F.hardtanh, F.silu, F.hardswish, F.elu, F.mish, torch.abs, torch.neg,
        lambda x: x * 0.5 / 3, lambda x: x.clamp(-1, 2), lambda x: x.clamp(max=1.0),
        lambda x: F.avg_pool2d(x, 2, padding=1), lambda x: F.max_pool2d(x, 3, 1, 1),
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), lambda x: x.transpose(2, 3),
        lambda x: x * x.mean((2, 3), keepdim=True), lambda x: x * torch.sigmoid(x),
        lambda x: F.adaptive_max_pool2d(x, 2), lambda x: torch.maximum(x, -x),
        lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    ],
)  # fmt: skip
def test_zero_passes_through(function):
    graph = traced_graph(Activated(function))
    candidate = Candidate.of({"one": LayerQuant((4, 0, 4, 0)), "two": 4})
    assert live_inputs(graph, candidate)["two"].tolist() == [True, False, True, False]
    assert plan_removal(graph, candidate).columns["two"].tolist() == [0, 2]


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid, torch.exp, F.hardsigmoid, F.softplus, lambda x: x + 1,
        lambda x: x.clamp(min=0.5), lambda x: F.hardtanh(x, 0.1, 1.0),
        lambda x: x.softmax(1), lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
        lambda x: F.layer_norm(x, (4, 8, 8)), lambda x: 1 - x,
    ],
)  # fmt: skip
def test_zero_does_not_pass_through(function):
    graph = traced_graph(Activated(function))
    candidate = Candidate.of({"one": LayerQuant((4, 0, 4, 0)), "two": 4})
    assert live_inputs(graph, candidate)["two"].all()
    assert not plan_removal(graph, candidate)


def test_outputs_are_never_removed():
    graph = traced_graph(Activated(F.relu))
    assert not plan_removal(graph, Candidate.of({"two": LayerQuant((0, 4, 4))}))
    (pinned,) = [tie for tie in tied_channels(graph) if not tie.removable]
    assert pinned.layers == ("two",)


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.project = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.one, self.two = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.two(F.relu(self.one(x))) + self.project(x)
        return self.head(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))


def test_of_two_branches_the_larger_may_be_zero_as_a_whole():
    assert bypassed_layers(traced_graph(Bottleneck())) == {"one", "two"}


def test_a_chain_has_no_layer_that_is_bypassed():
    assert not bypassed_layers(traced_graph(Flattened()))


@pytest.mark.parametrize("layer", ["stem", "one", "two"])
def test_shapes_agree_with_torch_pruning(layer):
    torch.manual_seed(0)
    model, x = Bottleneck().eval(), torch.randn(1, 3, 8, 8)
    traced = trace(model, (x,))
    widths: dict[str, list[int]] = {n.name: [4] * n.out_channels for n in traced.graph.layers}
    for tie in tied_channels(traced.graph):
        if tie.channels[0] in ((layer, 1), (layer, 2)) or {(layer, 1), (layer, 2)} & {
            *tie.channels
        }:
            for name, channel in tie.channels:
                widths[name][channel] = 0
    candidate = Candidate.of({n: LayerQuant(tuple(w)) for n, w in widths.items()})
    removal = plan_removal(traced.graph, candidate)
    _, params = remove_channels(traced.graph, traced.params, removal)
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, x)
    dependencies.get_pruning_group(
        getattr(model, layer), torch_pruning.prune_conv_out_channels, [1, 2]
    ).prune()
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in params.items()} == theirs
