from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tied_networks import (
    NETWORKS,
    ODD_NETWORKS,
    candidate_without,
    draw_zeros,
    make,
)
from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.channels import live_inputs, tied_channels, zero_channels
from quant_ops.executor import Executor
from quant_ops.graph import Graph
from quant_ops.layout import from_canonical, to_canonical
from quant_ops.operators import CONV, CONV_TRANSPOSE, LINEAR
from quant_ops.removal import plan_removal, remove_channels
from search.capture import Traced, trace


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda c: c.__name__)
def traced(request) -> Traced:
    return make(request.param)


def zeroed(traced: Traced, candidate: Candidate) -> dict[str, Tensor]:
    """The float parameters with rows and biases of 0-bit channels set to 0."""
    params = {name: t.clone() for name, t in traced.params.items()}
    for name, channels in zero_channels(traced.graph, candidate).items():
        layer = traced.graph.layer_of[name]
        rows = sorted(channels)
        canonical = to_canonical(layer, params[layer.weight]).clone()
        canonical[rows] = 0
        params[layer.weight] = from_canonical(layer, canonical)
        params[layer.bias][rows] = 0
    return params


def check_removal_is_exact(
    traced: Traced, candidate: Candidate, inputs: Sequence[Tensor] = ()
) -> Graph:
    params = zeroed(traced, candidate)
    removal = plan_removal(traced.graph, candidate)
    graph, smaller = remove_channels(traced.graph, params, removal)
    x = inputs or [torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    wanted, found = Executor(traced.graph)(params, x), Executor(graph)(smaller, x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    one = [value[:1] for value in x]
    _, values = Executor(graph).run(smaller, one, keep=range(len(graph.nodes)))
    for index, node in enumerate(graph.nodes):
        if isinstance(values[index], Tensor):
            assert tuple(values[index].shape) == node.shape, node
    for layer in graph.layers:
        assert tuple(smaller[layer.weight].shape) == layer.weight_shape
    return graph


@settings(max_examples=30, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_the_smaller_network_computes_the_same(traced, data):
    zeros = draw_zeros(traced, data)
    check_removal_is_exact(traced, candidate_without(traced.graph, zeros))


@settings(max_examples=15, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_dead_inputs_are_those_that_are_zero(traced, data):
    graph = traced.graph
    candidate = candidate_without(graph, draw_zeros(traced, data))
    live = live_inputs(graph, candidate)
    sources = {
        layer.name: [graph.nodes[s].args[0].index for s in layer.sites]
        for layer in graph.layers
        if graph.nodes[layer.sites[0]].op in CONV | CONV_TRANSPOSE | LINEAR
    }
    keep = [i for indices in sources.values() for i in indices]
    nonzero = {name: np.zeros(mask.size, np.bool_) for name, mask in live.items()}
    for seed in range(64):  # a relu that is always 0 under one draw of parameters is not dead
        values = run_on_random_parameters(traced, candidate, seed, keep)
        for name, indices in sources.items():
            axis = -1 if graph.layer_of[name].kind == "linear" else 1
            for i in indices:
                nonzero[name] |= values[i].movedim(axis, 0).flatten(1).abs().amax(1).numpy() > 0
        if all((nonzero[name] >= mask).all() for name, mask in live.items()):
            break
    assert set(live) == set(sources)
    for name, mask in live.items():
        if name == "block.self_attn.out_proj":  # attention is opaque: a zero value is not seen
            mask = mask & nonzero[name]
        assert np.array_equal(mask, nonzero[name]), name


def run_on_random_parameters(
    traced: Traced, candidate: Candidate, seed: int, keep: list[int]
) -> dict[int, Tensor]:
    torch.manual_seed(seed)
    params = {name: torch.randn_like(t) for name, t in traced.params.items()}
    other = replace(traced, params=params)
    inputs = [torch.randn(16, 3, 8, 8)]
    return Executor(traced.graph).run(zeroed(other, candidate), inputs, keep=keep)[1]


def test_a_tie_leaves_unless_a_value_would_lose_all_channels(traced):
    n_left = 0
    for tie in [t for t in tied_channels(traced.graph) if t.removable][:40]:
        zeros: dict[str, set[int]] = {}
        for name, channel in tie.channels:
            zeros.setdefault(name, set()).add(channel)
        graph = check_removal_is_exact(traced, candidate_without(traced.graph, zeros))
        now = graph.layer_of
        lost = {x.name: x.out_channels - now[x.name].out_channels for x in traced.graph.layers}
        left = {name: n for name, n in lost.items() if n and now[name].kind != "other"}
        assert left in ({}, {name: len(channels) for name, channels in zeros.items()})
        n_left += bool(left)
    assert n_left > 0


def test_one_channel_of_a_value_always_stays(traced):
    zeros = {x.name: set(range(x.out_channels)) for x in traced.graph.searchable_layers}
    graph = check_removal_is_exact(traced, candidate_without(traced.graph, zeros))
    assert min(layer.out_channels for layer in graph.layers) >= 1


def test_without_zero_widths_nothing_is_removed(traced):
    removal = plan_removal(traced.graph, candidate_without(traced.graph, {}))
    assert not removal
    graph, params = remove_channels(traced.graph, traced.params, removal)
    assert graph is traced.graph
    assert params == traced.params


@pytest.mark.parametrize(("network", "inputs", "removable"), ODD_NETWORKS)
def test_odd_networks_lose_what_they_can(network, inputs, removable):
    torch.manual_seed(0)
    traced = trace(network(), inputs)
    ties = [tie for tie in tied_channels(traced.graph) if tie.removable]
    found: dict[str, set[int]] = {}
    for name, channel in [c for tie in ties for c in tie.channels]:
        found.setdefault(name, set()).add(channel)
    assert {name: len(channels) for name, channels in found.items()} == removable
    zeros: dict[str, set[int]] = {}
    for name, channel in [c for tie in ties[::2] for c in tie.channels]:
        zeros.setdefault(name, set()).add(channel)
    graph = check_removal_is_exact(traced, candidate_without(traced.graph, zeros), inputs)
    for name, channels in zeros.items():
        now, before = graph.layer_of[name], traced.graph.layer_of[name]
        assert now.out_channels == before.out_channels - len(channels)
