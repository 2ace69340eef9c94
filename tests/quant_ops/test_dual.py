"""A residual layer beside a layer: the same network, its costs, its file, its integers."""

import numpy as np
import pytest
import torch
from torch import nn

from cost_models.bops import BOPs
from cost_models.macs import MACs
from cost_models.memory import PeakMemory
from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import bypassed_layers
from quant_ops.correction import reestimate_norms
from quant_ops.dual import (
    Pair,
    pairs,
    partial_nodes,
    residual_of,
    with_residuals,
    without_unused,
    without_unused_layers,
)
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.lowering import lower
from quant_ops.moments import collect_moments
from quant_ops.packed import PackedModel, size_bytes
from quant_ops.reference import fake_quant_transforms, run
from quant_ops.rounding import output_error, round_layers
from search.capture import trace


class Varied(nn.Module):
    """A strided, a grouped and a transposed convolution, one that is called twice, a linear one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, stride=2, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        return self.head(x.mean((2, 3)))


NAMES = ("stem", "twice", "grouped", "up", "head")


def make_network():
    torch.manual_seed(0)
    images = torch.randn(24, 2, 8, 8)
    traced = trace(Varied().eval(), (images[:2],))
    edges = {edge.name: edge.node for edge in activation_edges(traced.graph)}
    calibration = calibrate(traced.graph, traced.params, [((images,), None)], edges=edges)
    graph, params = with_residuals(traced.graph, traced.params, NAMES)
    return traced, calibration, graph, params, images


TRACED, CALIBRATION, GRAPH, PARAMS, IMAGES = make_network()
BANK = WeightBank(GRAPH, PARAMS, CALIBRATION, range_setter="weighted_mse")


def widths(wide, residual, **others):
    layers = {}
    for name in NAMES:
        layers[name] = wide
        layers[f"{name}.residual"] = others.get(name, residual)
    return layers


def outputs(graph, params):
    return Executor(graph)(params, (IMAGES,))[0]


def test_the_float_network_stays_what_it_is():
    assert torch.equal(outputs(GRAPH, PARAMS), outputs(TRACED.graph, TRACED.params))
    edges = [e.name for e in activation_edges(GRAPH) if e.kind != "partial"]
    assert edges == [e.name for e in activation_edges(TRACED.graph)]


def test_every_pair_is_recognised_by_its_structure_in_the_file_too():
    assert [(p.main, p.residual) for p in pairs(GRAPH)] == [(n, f"{n}.residual") for n in NAMES]
    assert len(partial_nodes(GRAPH)) == 2 * (len(NAMES) + 1)
    assert pairs(TRACED.graph) == ()
    read = PackedModel.from_model(BANK.quantize(Candidate.of(widths(3, 2)))).model
    assert [p.sites for p in pairs(read.graph)] == [p.sites for p in pairs(GRAPH)]


def test_an_addition_of_two_layers_that_is_in_the_network_is_no_pair():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.one(x) + self.two(x)

    assert pairs(trace(Parallel(), (torch.randn(2, 4),)).graph) == ()


def test_the_residual_may_vanish_and_its_layer_not_with_it():
    assert bypassed_layers(GRAPH) >= set(residual_of(GRAPH).values())
    assert "head" not in bypassed_layers(GRAPH)


@pytest.mark.parametrize("wide", [1, 3, 8])
def test_a_residual_that_is_not_used_costs_nothing(wide):
    single = Candidate.of(dict.fromkeys(NAMES, wide), {"x": 8})
    absent = Candidate.of(widths(wide, 0), {"x": 8})
    for model in (MACs(), BOPs(), PeakMemory()):
        assert model.cost(GRAPH, absent) == model.cost(TRACED.graph, single)
    assert size_bytes(GRAPH, absent) == size_bytes(TRACED.graph, single)
    graph, candidate = without_unused(GRAPH, absent)
    assert (graph.nodes, graph.layers, candidate) == (
        TRACED.graph.nodes,
        TRACED.graph.layers,
        single,
    )
    before = WeightBank(TRACED.graph, TRACED.params, CALIBRATION, range_setter="weighted_mse")
    assert PackedModel.from_model(BANK.quantize(absent)).data == (
        PackedModel.from_model(before.quantize(single)).data
    )


def test_a_residual_in_use_has_macs_and_bops_of_its_own():
    single, both = Candidate.of(widths(4, 0)), Candidate.of(widths(4, 2))
    assert MACs().cost(GRAPH, both) == 2 * MACs().cost(GRAPH, single)
    assert BOPs().cost(GRAPH, both) == 1.5 * BOPs().cost(GRAPH, single)
    one = Candidate.of(widths(4, 0, head=2))
    assert MACs().cost(GRAPH, one) - MACs().cost(GRAPH, single) == GRAPH.layer_of["head"].macs


CANDIDATES = {
    "pairs": widths(2, 2),
    "some": widths(3, 0, twice=1, head=1.6),
    "channels": {
        **widths(3, 2),
        "stem": LayerQuant((2, 0, 4, 1, 2, 8, 3, 3)),
        "stem.residual": LayerQuant((2, 0, 0, 3, 1, 1, 0, 4)),
        "up.residual": LayerQuant((0, 0, 2, 2, 1, 0)),
    },
    "affine": {n: LayerQuant((w,), "affine") for n, w in widths(3, 2).items()},
    "groups": {**widths(3, 2), "twice": LayerQuant((2,), "auto", 9),
               "twice.residual": LayerQuant((2,), "auto", 9)},
    "residual alone": {**widths(3, 2), "twice": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_file_is_as_long_as_predicted_and_computes_what_was_evaluated(name):
    candidate = Candidate.of(CANDIDATES[name])
    model = BANK.quantize(candidate)
    packed = PackedModel.from_model(model)
    assert packed.size_bytes == size_bytes(GRAPH, candidate)
    params = BANK.params(candidate)
    assert all(torch.equal(params[n], t) for n, t in model.params().items())
    assert packed(IMAGES) == pytest.approx(outputs(GRAPH, params), abs=1e-5)


@pytest.mark.parametrize("name", ["pairs", "some", "channels", "affine"])
def test_integers_compute_what_was_evaluated_and_nothing_else(name):
    edges = {e.name: 8 for e in activation_edges(GRAPH) if e.kind not in ("output", "partial")}
    model = BANK.quantize(Candidate.of(CANDIDATES[name], edges))
    packed = PackedModel.from_model(model)
    program = lower(packed.model)
    assert not program.float_islands
    integers = torch.from_numpy(run(program, [IMAGES.numpy()]).values[0])
    simulated = Executor(GRAPH).run(
        model.params(), (IMAGES,), transforms=fake_quant_transforms(model)
    )[0][0]
    assert packed(IMAGES) == pytest.approx(simulated, abs=1e-4)
    step = max(float(a.scale) for a in model.activations.values())
    assert float((integers - simulated).abs().max()) < step
    assert float((integers - simulated).abs().mean()) < 0.02 * float(simulated.abs().mean())


@pytest.mark.parametrize("rounds", [False, True])
def test_the_bias_absorbs_the_mean_error_of_the_sum(rounds):
    moments = collect_moments(TRACED.graph, TRACED.params, [((IMAGES,), None)])
    bank = WeightBank(GRAPH, PARAMS, CALIBRATION, moments=moments if rounds else None)
    model = bank.quantize(Candidate.of({"twice": 2, "twice.residual": 1}))
    one = without_pairs_of(model, "twice")
    found, wanted = (mean_output(params) for params in (one, TRACED.params))
    assert found == pytest.approx(wanted, abs=2e-3)


def without_pairs_of(model, name):
    """Parameters of the network as captured, with the sum of both tensors as weight."""
    layer, residual = GRAPH.layer_of[name], GRAPH.layer_of[f"{name}.residual"]
    params = model.params()
    return {
        **TRACED.params,
        layer.weight: params[layer.weight] + params[residual.weight],
        layer.bias: params[layer.bias],
    }


def mean_output(params):
    """(8,) mean of both calls of the layer `twice` on the float network's own inputs."""
    graph = TRACED.graph
    sites = graph.layer_of["twice"].sites
    sources = [graph.nodes[site].args[0].index for site in sites]
    kept = Executor(graph).run(TRACED.params, (IMAGES,), keep=sources)[1]
    weight, bias = params["twice.weight"], params["twice.bias"]
    values = [nn.functional.conv2d(kept[s], weight, bias, padding=1) for s in sources]
    return torch.stack(values).mean((0, 1, 3, 4))


def test_second_order_rounding_of_a_pair_lowers_the_error_of_its_sum():
    moments = collect_moments(TRACED.graph, TRACED.params, [((IMAGES,), None)])
    model = BANK.quantize(Candidate.of(widths(2, 1)))
    rounded, wanted = round_layers(model, PARAMS, moments, CALIBRATION)
    assert wanted.keys() == rounded.layers.keys()
    for name in ("stem", "twice", "head"):
        layer, params = GRAPH.layer_of[name], (model.params(), rounded.params())
        weight = PARAMS[layer.weight].double().flatten(1)[None]
        hessian = moments[name].second if layer.bias is None else moments[name].covariance
        before, after = (
            output_error(
                weight,
                (p[layer.weight] + p[f"{name}.residual.weight"]).double().flatten(1)[None],
                hessian,
            ).sum()
            for p in params
        )
        assert float(after) < float(before)


def test_norms_are_estimated_of_the_sum():
    model = BANK.quantize(Candidate.of({"grouped": 2, "grouped.residual": 1}))
    again = reestimate_norms(model, CALIBRATION, [((IMAGES,), None)])
    total = pairs(GRAPH)[2].sites[0][2]
    kept = Executor(GRAPH).run(again.params(), (IMAGES,), keep=[total])[1]
    assert kept[total].mean((0, 2, 3)) == pytest.approx(
        CALIBRATION.output_mean["grouped"], abs=1e-3
    )
    for name in model.layers:
        assert np.array_equal(again.layers[name].codes, model.layers[name].codes)


def test_a_model_without_pairs_is_left_alone():
    model = WeightBank(TRACED.graph, TRACED.params, CALIBRATION).quantize(Candidate.of({"head": 4}))
    assert without_unused_layers(model) is model
    assert isinstance(pairs(GRAPH)[0], Pair)
