"""The controller on problems whose answer is a formula."""

import math

import pytest
import torch

from quant_ops.learned_widths.controller import ControllerSettings, SizeController


def run(target, scale=1.0, steps=400, settings=None, resume_at=None):
    """Minimise scale/2 sum k (b - a)^2 under sum n b = target, by gradient descent."""
    k, a = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 7.0, 6.0])
    n = torch.tensor([10.0, 20.0, 30.0])
    b = a.clone().requires_grad_()
    controller = SizeController(target, settings)
    optimizer = torch.optim.SGD([b], lr=0.1 / scale)
    for step in range(steps):
        if step == resume_at:
            state = controller.state_dict()
            controller = SizeController(target, settings)
            controller.load_state_dict(state)
        optimizer.zero_grad()
        loss = scale / 2 * (k * (b - a).square()).sum()
        (loss + controller((n * b).sum(), step / steps)).backward()
        optimizer.step()
    price = ((n * a).sum() - target) / (n.square() / k).sum()
    return b.detach(), a - price * n / k, controller.multiplier, scale * float(price) * target, n


@pytest.mark.parametrize("target", [300.0, 200.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_quadratic_losses_end_at_the_lagrangian_optimum(target, scale):
    found, expected, multiplier, price, n = run(target, scale)
    assert float((n * found).sum()) == pytest.approx(target, rel=0.02)
    assert torch.allclose(found, expected, atol=0.15)
    assert multiplier == pytest.approx(price, rel=0.1)


def test_a_resumed_controller_goes_on_where_it_was():
    assert torch.equal(run(250.0)[0], run(250.0, resume_at=150)[0])


def test_the_wanted_size_falls_along_a_line_of_logarithms():
    controller = SizeController(100.0, ControllerSettings(by=0.5))
    controller(torch.tensor(400.0), 0.0)
    wanted = [float(controller.wanted(share)) for share in (0.0, 0.25, 0.5, 0.9)]
    assert wanted == pytest.approx([400, 200, 100, 100])


def test_the_term_is_the_multiplier_times_the_relative_size():
    controller = SizeController(100.0).eval()
    controller.first_bytes.fill_(200.0)
    size = torch.tensor(110.0, requires_grad=True)
    term = controller(size, 1.0)
    term.backward()
    # proportional part alone: the state stands still in eval mode
    assert term.item() == pytest.approx(0.01 * 1.1**2.0 * 1.1, rel=1e-4)
    assert float(size.grad) == pytest.approx(term.item() / 110)
    assert float(controller.log_multiplier) == pytest.approx(math.log(0.01))


def test_a_target_of_nothing_is_refused():
    with pytest.raises(ValueError, match="positive number of bytes"):
        SizeController(0)
