"""What `--prepare` and `--correction analytic` do to a task's network, and what they leave."""

import pytest
import torch
from torch import nn

from search.config import RunConfig
from search.prepare import prepare
from search.task import Task


def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[::2] *= 30  # channels that differ widely share an activation step
        model[3].weight[:, ::2] /= 30
    images = torch.randn(96, 3, 8, 8)
    return Task(
        name="uneven",
        model=model,
        calibration=[((images[:48],), None)],
        validation=[((images[48:],), model(images[48:]).argmax(dim=1))],
    )


def prepared(**settings):
    return prepare(task(), RunConfig(task="uneven", **settings))


def test_equalized_networks_keep_the_float_outputs_and_lose_less_to_activation_steps():
    plain, equal = (prepared(activation_bits=(4,), prepare=p) for p in ((), ("equalize",)))
    judge = equal.evaluator.judge("search")
    run = equal.evaluator._executor
    for (inputs, _), reference in zip(judge.split.batches, judge.float_outputs, strict=True):
        found = run(equal.traced.params, inputs)[0]
        assert torch.allclose(found, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    losses = [p.evaluator.measure(p.space.uniform(8)).loss for p in (plain, equal)]
    assert losses[1] < 0.8 * losses[0]


def test_the_reference_is_the_network_as_given():
    absorbed = prepared(prepare=("equalize", "absorb"))
    original = prepared()
    assert absorbed.spec.original.params.keys() == original.traced.params.keys()
    for name, value in original.traced.params.items():
        assert torch.equal(value, absorbed.spec.original.params[name])
    assert absorbed.digests["model"] != original.digests["model"]


def test_analytic_correction_needs_no_mean_of_the_data():
    analytic, none = (prepared(correction=c) for c in ("analytic", "none"))
    measured = prepared(correction="mean")
    name = analytic.space.layers[1].name
    assert not torch.equal(
        analytic.spec.calibration.tap_mean[name], measured.spec.calibration.tap_mean[name]
    )
    losses = [p.evaluator.measure(p.space.uniform(2)).loss for p in (analytic, none)]
    assert losses[0] != pytest.approx(losses[1])


def test_a_pinned_edge_has_one_width_and_the_others_those_asked_for():
    pinned = prepared(activation_bits=(4, 8), pins={"edge:conv2d*": 4})
    widths = {edge.name: edge.bit_widths for edge in pinned.space.activations}
    assert sum(w == (4,) for name, w in widths.items() if name.startswith("conv2d")) > 0
    assert all(w == (4,) for name, w in widths.items() if name.startswith("conv2d"))
    assert (4, 8) in widths.values()
