import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tied_networks import NETWORKS, candidate_without, draw_zeros, make

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.qat.network import QuantizedNetwork
from quant_ops.quantized import QuantizedModel
from quant_ops.reduced import Reduction
from quant_ops.reference import fake_quant_transforms
from search.capture import Traced


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda c: c.__name__)
def traced(request) -> Traced:
    return make(request.param)


def images(n: int = 3) -> list[torch.Tensor]:
    return [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))]


def quantized(traced: Traced, data: st.DataObject) -> QuantizedModel:
    edges = {edge.name: edge.node for edge in activation_edges(traced.graph)}
    calibration = calibrate(traced.graph, traced.params, [(images(), None)], edges=edges)
    bank = WeightBank(traced.graph, traced.params, calibration)
    candidate = candidate_without(traced.graph, draw_zeros(traced, data))
    if data.draw(st.booleans()):
        candidate = Candidate.of(dict(candidate.layers), dict.fromkeys(edges, 8))
    return bank.quantize(candidate)


def outputs(model: QuantizedModel) -> list[torch.Tensor]:
    """As the training computes: in floats, activations rounded."""
    transforms = fake_quant_transforms(model)
    return list(Executor(model.graph).apply(model.params(), images(), transforms))


@settings(max_examples=10, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_what_is_trained_without_removed_channels_is_the_whole_network(traced, data):
    model = quantized(traced, data)
    reduction = Reduction.of(model, traced.params)
    network = QuantizedNetwork(reduction.model.graph, reduction.params, reduction.model)
    same = reduction.widened(network.to_model())
    for name, layer in model.layers.items():
        assert same.layers[name].content() == layer.content()
    with torch.no_grad():
        for tensor in network.parameters():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    trained = network.to_model()
    widened = reduction.widened(trained)
    assert widened.candidate == model.candidate
    for ours, theirs in zip(outputs(widened), outputs(trained), strict=True):
        off = (ours - theirs).abs()
        # a sum in another order may round an activation the other way
        allowed = 0.02 if model.activations else 1e-4
        assert off.max() <= allowed * (theirs.abs().max() + 1)


def test_removed_channels_take_no_part_in_the_training():
    traced = make(NETWORKS[1])
    zeros = {"blocks.1.one.0": {0, 2, 3, 5}}
    calibration = calibrate(traced.graph, traced.params, [(images(), None)])
    bank = WeightBank(traced.graph, traced.params, calibration)
    model = bank.quantize(candidate_without(traced.graph, zeros))
    reduction = Reduction.of(model, traced.params)
    shapes = {name: q.codes.shape for name, q in reduction.model.layers.items()}
    assert shapes["blocks.1.one.0"] == (4, 36)
    assert shapes["blocks.1.two.0"] == (8, 36)
    assert np.array_equal(
        reduction.widened(reduction.model).layers["blocks.1.two.0"].codes,
        model.layers["blocks.1.two.0"].codes,
    )
