"""Filling a budget: never above it, and nothing more fits."""

import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.candidate import Candidate
from quant_ops.errors import BudgetError
from quant_ops.learned_widths.fill import fill
from quant_ops.learned_widths.size import with_widths
from quant_ops.packed_size import size_bytes
from search.capture import trace

LEGAL = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    layers = nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5)
    return trace(nn.Sequential(*layers).eval(), (torch.rand(2, 30),)).graph


def arguments(graph, legal=LEGAL, seed=0):
    rng = np.random.default_rng(seed)
    layers = graph.searchable_layers
    return {
        "legal": {layer.name: legal for layer in layers},
        "scores": {layer.name: 10 ** rng.uniform(-2, 2, layer.out_channels) for layer in layers},
        "size_of": lambda candidate: size_bytes(graph, candidate),
    }


def uniform(graph, width):
    return Candidate.of({layer.name: width for layer in graph.searchable_layers})


@pytest.mark.parametrize("start", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [750, 900, 1200, 1700, 2200])
def test_never_above_and_no_step_fits_any_more(graph, start, budget):
    filled = fill(graph, uniform(graph, start), budget_bytes=budget, **arguments(graph))
    size = size_bytes(graph, filled)
    assert size <= budget
    assert size >= 0.98 * budget
    for name, quant in filled.layers:
        widths = quant.per_channel(graph.layer_of[name].out_channels)
        assert 0 not in widths
        for channel, width in enumerate(widths):
            if width < 8:
                wider = LEGAL[LEGAL.index(width) + 1]
                step = (*widths[:channel], wider, *widths[channel + 1 :])
                assert size_bytes(graph, with_widths(filled, {name: step})) > budget


def test_channels_that_matter_more_get_at_least_as_many_bits(graph):
    given = arguments(graph)
    filled = fill(graph, uniform(graph, 2), budget_bytes=1300, **given)
    name, quant = filled.layers[0]
    order = np.argsort(given["scores"][name])
    widths = np.array(quant.per_channel(40))[order]
    # the last steps are those that still fit, whoever's they are
    assert widths[-10:].min() > widths[:10].max() - 1
    assert widths[-10:].mean() > widths[:10].mean() + 1


def test_groups_move_together(graph):
    groups = {
        layer.name: [tuple(range(at, min(at + 8, layer.out_channels)))
                     for at in range(0, layer.out_channels, 8)]
        for layer in graph.searchable_layers
    }  # fmt: skip
    filled = fill(graph, uniform(graph, 2), budget_bytes=1400, groups=groups, **arguments(graph))
    assert size_bytes(graph, filled) <= 1400
    for name, quant in filled.layers:
        widths = quant.per_channel(graph.layer_of[name].out_channels)
        for channels in groups[name]:
            assert len({widths[c] for c in channels}) == 1


def test_removed_channels_stay_removed(graph):
    first = graph.searchable_layers[0].name
    start = with_widths(uniform(graph, 2), {first: (0,) * 10 + (2,) * 30})
    filled = fill(graph, start, budget_bytes=1500, **arguments(graph))
    widths = filled.assignment[first].per_channel(40)
    assert [i for i, width in enumerate(widths) if width == 0] == list(range(10))
    assert 1470 <= size_bytes(graph, filled) <= 1500


def test_layers_without_legal_widths_keep_theirs(graph):
    given = arguments(graph)
    last = graph.searchable_layers[-1].name
    del given["legal"][last]
    filled = fill(graph, uniform(graph, 3), budget_bytes=1400, **given)
    assert filled.assignment[last].bit_widths == (3,)


def test_channels_go_only_where_that_is_allowed_and_one_stays(graph):
    given = arguments(graph)
    floor = size_bytes(graph, uniform(graph, 1))
    with pytest.raises(BudgetError, match=f"need {floor:,}"):
        fill(graph, uniform(graph, 4), budget_bytes=floor - 1, **given)
    filled = fill(graph, uniform(graph, 4), budget_bytes=floor - 100, remove=True, **given)
    assert size_bytes(graph, filled) <= floor - 100
    for name, quant in filled.layers:
        assert any(quant.per_channel(graph.layer_of[name].out_channels))


def test_widths_that_are_not_legal_are_refused(graph):
    with pytest.raises(ValueError, match="wanted one of"):
        fill(graph, uniform(graph, 5), budget_bytes=999, **arguments(graph, legal=(2, 4)))
