import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cost_models.base import CostModel
from cost_models.bops import BOPs
from cost_models.macs import MACs
from cost_models.memory import PeakMemory
from cost_models.table import COST_MODELS, cost_model
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.errors import UsageError
from quant_ops.graph import Graph
from quant_ops.removal import plan_removal, remove_channels
from search.capture import trace

SIDE = 8


class Residual(nn.Module):
    """conv 3 -> 4, relu, conv 4 -> 6, relu, conv 6 -> 4, add, mean, linear 4 -> 2."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.three, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = x + self.three(F.relu(self.two(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return trace(Residual(), (torch.randn(2, 3, SIDE, SIDE),)).graph


def test_macs_of_a_dense_network_have_a_closed_form(graph):
    pixels = SIDE * SIDE
    assert MACs().cost(graph, Candidate.of({})) == pixels * (27 * 4 + 36 * 6 + 6 * 4) + 8


@pytest.mark.parametrize("n_zero", range(6))
def test_macs_count_only_channels_that_stay(graph, n_zero):
    two = LayerQuant((0,) * n_zero + (4,) * (6 - n_zero))
    left = 6 - n_zero
    wanted = SIDE * SIDE * (27 * 4 + 36 * left + left * 4) + 8
    assert MACs().cost(graph, Candidate.of({"two": two})) == wanted


def test_macs_equal_those_of_the_smaller_network():
    torch.manual_seed(0)
    traced = trace(Residual(), (torch.randn(2, 3, SIDE, SIDE),))
    quants = {"one": (0, 4, 0, 2), "two": (0, 0, 3, 4, 5, 6), "three": (0, 4, 4, 0)}
    candidate = Candidate.of({name: LayerQuant(widths) for name, widths in quants.items()})
    removal = plan_removal(traced.graph, candidate)
    smaller, _ = remove_channels(traced.graph, traced.params, removal)
    assert removal.rows["one"].tolist() == [1, 2, 3]
    assert MACs().cost(traced.graph, candidate) == MACs().cost(smaller, Candidate.of({}))
    ram = PeakMemory()
    assert ram.cost(traced.graph, candidate) == ram.cost(smaller, Candidate.of({}))


def test_float_layers_and_activations_count_32_bits_in_bops(graph):
    assert BOPs().cost(graph, Candidate.of({})) == 1024 * MACs().cost(graph, Candidate.of({}))


def test_bops_sum_widths_over_channels_and_round_ternary_up(graph):
    two = LayerQuant((1, 1.6, 2, 4, 8, 8))
    bops = BOPs().cost(graph, Candidate.of({"one": 4, "two": two, "three": 1.6, "head": 8}))
    pixels = SIDE * SIDE
    wanted = 32 * (pixels * (27 * 4 * 4 + 36 * (1 + 2 + 2 + 4 + 8 + 8) + 24 * 2) + 8 * 8)
    assert bops == wanted


def test_bops_use_the_width_of_the_edge_that_a_layer_reads(graph):
    by_op = {node.op: node.name for node in graph.nodes}
    conv_one = graph.nodes[graph.layer_of["one"].sites[0]].name
    conv_two = graph.nodes[graph.layer_of["two"].sites[0]].name
    edges = {by_op["input"]: 8, conv_one: 4, conv_two: 2}
    weights = {layer.name: 8 for layer in graph.layers}
    pixels = SIDE * SIDE
    wanted = 8 * (pixels * (27 * 4 * 8 + 36 * 6 * 4 + 24 * 2) + 8 * 32)
    assert BOPs().cost(graph, Candidate.of(weights, edges)) == wanted


def test_a_channel_of_width_zero_is_free_in_bops_even_where_it_stays(graph):
    head = LayerQuant((0, 8))  # outputs of the network are never removed
    dense = BOPs().cost(graph, Candidate.of({"head": 8}))
    assert dense - BOPs().cost(graph, Candidate.of({"head": head})) == 32 * 4 * 8


def test_peak_memory_is_the_widest_step(graph):
    # While the second convolution runs: its input (kept for the addition) and its output.
    # While the third runs: that input, its own input (6) and its output (4).
    assert PeakMemory().cost(graph, Candidate.of({})) == 4 * SIDE * SIDE * (4 + 6 + 4)


def test_peak_memory_counts_activation_widths(graph):
    names = {layer.name: graph.nodes[layer.sites[0]].name for layer in graph.layers}
    edges = {names["one"]: 4, names["two"]: 2, names["three"]: 8}
    pixels = SIDE * SIDE
    # The sum is not quantized, so it outgrows both operands and takes the place of neither.
    wanted = pixels * 4 // 2 + pixels * 4 * 1 + pixels * 4 * 4
    assert PeakMemory().cost(graph, Candidate.of({}, edges)) == wanted
    edges[next(n.name for n in graph.nodes if n.op == "add.Tensor")] = 3
    wanted = pixels * 3 * 4 + pixels * 4 * 4 // 8  # the first layer, its input in float
    assert PeakMemory().cost(graph, Candidate.of({}, edges)) == wanted


def test_peak_memory_shrinks_with_removed_channels(graph):
    two = LayerQuant((0, 0, 0, 4, 4, 4))
    cost = PeakMemory().cost(graph, Candidate.of({"two": two}))
    assert cost == 4 * SIDE * SIDE * (4 + 3 + 4)


class Elementwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y = torch.sigmoid(y.reshape(y.shape[0], -1)) * 2.0
        return y.reshape(y.shape[0], 5, 3)


def test_views_and_elementwise_operators_need_no_memory_of_their_own():
    graph = trace(Elementwise(), (torch.randn(2, 3, 5),)).graph
    assert PeakMemory().cost(graph, Candidate.of({})) == 4 * 15 * 2  # the input is not overwritten


def test_every_cost_model_of_the_table_is_one():
    for name in set(COST_MODELS) - {"size_bytes"}:
        model = cost_model(name)
        assert isinstance(model, CostModel)
        assert model.name == name
    assert COST_MODELS["size_bytes"] == "cost_models.size:PackedSize"
    assert {cost_model(n).budget_key for n in ("macs", "bops", "ram_bytes")} == {
        "macs", "bops", "ram",
    }  # fmt: skip


def test_an_unknown_cost_is_named():
    with pytest.raises(UsageError, match="'watts' is not a cost"):
        cost_model("watts")


def test_the_table_imports_nothing():
    assert "memory" not in vars(importlib.import_module("cost_models.table"))
