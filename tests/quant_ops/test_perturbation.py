"""Predicted losses against losses that were measured, and against closed forms."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate
from quant_ops.distill import kl_loss
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor
from quant_ops.perturbation import MEASURES, predicted_losses
from quant_ops.sensitivity import gaussian_gradient, sampled_label_gradient
from search.capture import trace

WIDTHS = (2, 3, 4, 6)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def bank_of(model, batches):
    traced = trace(model.eval(), batches[0][0])
    edges = {edge.name: edge.node for edge in activation_edges(traced.graph)}
    calibration = calibrate(traced.graph, traced.params, batches, edges=edges)
    return WeightBank(traced.graph, traced.params, calibration)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.head.weight *= 8
    batches = [((torch.randn(24, 3, 8, 8),), None) for _ in range(3)]
    return bank_of(model, batches), batches


def measured(bank, batches, change) -> float:
    executor, nodes = Executor(bank.graph), {e.name: e.node for e in activation_edges(bank.graph)}
    hooks = {nodes[n]: q.fake_quantize for n, q in bank.activations(change).items()}
    total = 0.0
    for inputs, _ in batches:
        outputs, _ = executor.run(bank.params(change), inputs, transforms=hooks)
        total += float(kl_loss(outputs, executor(bank.float_params, inputs)))
    return total / len(batches)


def single_changes(bank):
    layers = [Candidate.of({x.name: b}) for x in bank.graph.layers for b in WIDTHS]
    edges = [e.name for e in activation_edges(bank.graph) if e.kind == "inner"]
    return layers + [Candidate.of({}, {name: b}) for name in edges for b in (3, 5)]


@pytest.mark.parametrize("measure", MEASURES)
def test_predictions_rank_like_measurements(network, measure):
    bank, batches = network
    changes = single_changes(bank)
    exact = [measured(bank, batches, change) for change in changes]
    found = predicted_losses(bank, batches, changes, measure, sampled_label_gradient, logits=True)
    floor = 0.7 if measure == "gradient-l1" else 0.95
    assert spearmanr(found, exact).statistic > floor


def test_small_changes_are_predicted_to_a_few_percent(network):
    bank, batches = network
    changes = [Candidate.of({x.name: 6}) for x in bank.graph.layers]
    exact = [measured(bank, batches, change) for change in changes]
    found = predicted_losses(
        bank, batches, changes, "linearized", sampled_label_gradient, logits=True
    )
    assert found == pytest.approx(exact, rel=0.15)


def test_a_linear_network_is_predicted_exactly_even_where_much_is_broken():
    torch.manual_seed(1)
    batches = [((torch.randn(32, 6),), None)]
    bank = bank_of(nn.Sequential(nn.Linear(6, 4)), batches)
    changes = [Candidate.of({"0": b}) for b in (1, 2, 4)]
    found = predicted_losses(
        bank, batches, changes, "linearized", sampled_label_gradient, logits=True
    )
    assert found == pytest.approx([measured(bank, batches, c) for c in changes], rel=1e-4)


def test_without_logits_the_second_order_is_that_of_the_squared_error():
    torch.manual_seed(2)
    batches = [((torch.randn(4000, 6),), None)]
    bank = bank_of(nn.Sequential(nn.Linear(6, 3)), batches)
    change = Candidate.of({"0": 3})
    (found,) = predicted_losses(
        bank, batches, [change], "linearized", gaussian_gradient, logits=False
    )
    executor, x = Executor(bank.graph), batches[0][0]
    (a,), (b,) = (executor(p, x) for p in (bank.params(change), bank.float_params))
    assert found == pytest.approx(0.5 * float((a - b).square().sum(dim=1).mean()), rel=0.1)


def test_an_unknown_measure_is_named(network):
    bank, batches = network
    with pytest.raises(ValueError, match="'guess' is not one of linearized"):
        predicted_losses(bank, batches, [], "guess", sampled_label_gradient, logits=True)
