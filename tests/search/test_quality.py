import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant_ops.errors import UsageError
from search.quality import (
    agreement,
    evaluate_metric,
    kl_divergence,
    metric_loss,
    metric_value_as_loss,
    quality_function,
    relative_error,
    worst_loss,
)
from search.task import ACCURACY, Metric, Task


def task(**changes):
    return Task("t", nn.Identity(), calibration=[], validation=[], **changes)


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_a_uniform_model_diverges_by_log_n_from_a_certain_one(n_classes):
    certain = torch.full((3, n_classes), -1e4)
    certain[:, 1] = 1e4
    loss = kl_divergence(torch.zeros(3, n_classes), certain)
    assert torch.allclose(loss, torch.full((3,), math.log(n_classes)).double())


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_divergence_of_two_coins_is_the_formula(p, q):
    def logits(share):
        return torch.tensor([[math.log(share), math.log(1 - share)]], dtype=torch.float64)

    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(kl_divergence(logits(q), logits(p))) == pytest.approx(expected, abs=1e-12)


def test_divergence_ignores_a_common_shift_and_is_0_for_equal_outputs():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    assert kl_divergence(logits + 3, logits).max() < 1e-12
    assert kl_divergence(logits, logits).max() == 0


def test_positions_are_averaged_and_leaves_are_summed():
    a, b = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 3, 6)
    per_position = [kl_divergence(a[..., i, j], b[..., i, j]) for i in range(3) for j in range(6)]
    expected = torch.stack(per_position).mean(dim=0)
    assert torch.allclose(kl_divergence(a, b), expected)
    assert torch.allclose(kl_divergence({"x": a, "y": a}, {"x": b, "y": b}), 2 * expected)


def test_relative_error_is_relative_to_the_mean_power_of_the_split():
    floats = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])]  # powers 25 and 1
    loss = quality_function(task(quality_loss="relative-error"), floats)
    assert float(loss(torch.tensor([[0.0, 0.0]]), floats[1])) == pytest.approx(1 / 13)
    outputs_of_0 = [float(loss(torch.zeros(1, 2), f)) for f in floats]
    assert sum(outputs_of_0) / 2 == pytest.approx(1)


def test_relative_error_without_a_split_is_each_samples_own():
    floats = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    outputs = torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(outputs, floats).tolist() == [0.04, 0.0, math.inf]


def test_relative_error_averages_over_floating_leaves():
    floats = (torch.ones(1, 4), torch.ones(1, 2), torch.ones(1, dtype=torch.int64))
    outputs = (torch.zeros(1, 4), torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    assert relative_error(outputs, floats).tolist() == [0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["kl", "relative-error"])
def test_outputs_that_are_not_finite_are_infinitely_bad(name, bad):
    outputs = torch.zeros(2, 3)
    outputs[1, 2] = bad
    loss = quality_function(task(quality_loss=name))(outputs, torch.ones(2, 3))
    assert math.isfinite(loss[0])
    assert loss[1] == math.inf


def test_auto_is_divergence_for_classes_and_relative_error_elsewhere():
    error = Metric("mae", lambda y, t: (y - t).abs().mean(dim=1), higher_is_better=False)
    y, f = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(quality_function(task())(y, f), kl_divergence(y, f))
    assert torch.equal(quality_function(task(metric=error))(y, f), relative_error(y, f))
    named = task(metric=error, class_names=("a", "b", "c"))
    assert torch.equal(quality_function(named)(y, f), kl_divergence(y, f))


def test_a_users_loss_is_taken_and_its_shape_checked():
    own = quality_function(task(quality_loss=lambda y, f: (y - f).abs().amax(dim=1)))
    assert own(torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [0.0, 2.0]])).tolist() == [3, 2]
    scalar = quality_function(task(quality_loss=lambda y, f: (y - f).mean()))
    with pytest.raises(UsageError, match=r"shape \(2,\), but gave one of shape \(\)"):
        scalar(torch.zeros(2, 2), torch.zeros(2, 2))


def test_unknown_loss_is_named():
    with pytest.raises(UsageError, match="'mse'"):
        quality_function(task(quality_loss="mse"))


def test_logits_of_one_dimension_are_refused():
    with pytest.raises(UsageError, match=r"but an output has shape \(3,\)"):
        kl_divergence(torch.zeros(3), torch.zeros(3))


def test_worst_loss_is_that_of_a_model_that_knows_nothing():
    assert worst_loss(task(), [torch.zeros(2, 10)]) == math.log(10)
    assert worst_loss(task(quality_loss="relative-error"), [torch.zeros(2, 10)]) == 1
    assert worst_loss(task(worst_loss=7.0), [torch.zeros(2, 10)]) == 7
    with pytest.raises(UsageError, match="worst_loss"):
        worst_loss(task(quality_loss=lambda y, f: y), [torch.zeros(2, 10)])


def test_metric_is_turned_once():
    outputs, target = torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
    assert metric_loss(ACCURACY)(outputs, target).tolist() == [0, 1]
    distance = Metric("d", lambda y, t: y[:, 0] - t, higher_is_better=False)
    assert metric_loss(distance)(outputs, target).tolist() == [2, 1]
    assert metric_value_as_loss(distance, 1.5) == 1.5
    assert metric_value_as_loss(Metric("psnr", max), 30.0) == -30.0


def test_metric_of_the_whole_split_cannot_be_the_objective():
    with pytest.raises(UsageError, match="whole split"):
        metric_loss(Metric("f1", max, per_sample=False))


def test_metric_is_the_mean_over_samples_not_over_batches():
    outputs = [torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, 0.0]])]
    targets = [torch.tensor([0, 0, 0]), torch.tensor([1])]
    assert evaluate_metric(ACCURACY, outputs, targets) == 0.75


def test_metric_of_the_whole_split_sees_all_of_it_at_once():
    spread = Metric("spread", lambda y, t: y["a"].max() - t.min(), per_sample=False)
    outputs = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([5.0, 2.0])}]
    assert evaluate_metric(spread, outputs, [torch.tensor([1]), torch.tensor([2, 3])]) == 4


def test_per_sample_metric_of_another_shape_is_refused():
    mean = Metric("mean", lambda y, t: y.mean())
    with pytest.raises(UsageError, match=r"\(3,\).*per_sample=False"):
        evaluate_metric(mean, [torch.zeros(3, 2)], [None])


def test_ties_go_to_the_lowest_index():
    floats = torch.tensor([[5.0, 1.0, 5.0]] * 3)
    outputs = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [math.nan, 0.0, 0.0]])
    assert agreement(outputs, floats).tolist() == [1, 0, 0]


def test_agreement_is_averaged_over_positions():
    floats = torch.zeros(1, 2, 4)
    floats[:, 1, :3] = 1
    assert agreement(torch.zeros(1, 2, 4), floats).tolist() == [0.25]
