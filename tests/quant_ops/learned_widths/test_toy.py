"""Two layers, one of which matters more: the same target for every method."""

import pytest
import torch

from quant_ops.learned_widths.controller import SizeController
from quant_ops.learned_widths.table import LEARNED_WIDTHS, learned_widths_class

LEARNERS = [name for name in sorted(LEARNED_WIDTHS) if learned_widths_class(name).learns]
STEPS, TARGET_BITS = 120, 4.0
LEGAL = (2, 3, 4, 6, 8)
SETTINGS = {"csq": [{}, {"gate": "l1"}], "diffq": [{}, {"noise": "gaussian"}]}
CASES = [(name, settings) for name in LEARNERS for settings in SETTINGS.get(name, [{}])]


def regression():
    """y = A x + B z, with A four times as large as B: layers of one shape, one input each."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 256, 12, generator=generator)
    weights = torch.randn(2, 8, 12, generator=generator) * torch.tensor([4.0, 1.0])[:, None, None]
    return inputs, weights, sum(x @ w.T for x, w in zip(inputs, weights, strict=True))


def loss_of(modules, params, inputs, target):
    outputs = sum(x @ m(w).T for x, m, w in zip(inputs, modules, params, strict=True))
    return (outputs - target).square().mean()


def mean_bits(modules):
    return torch.cat([module.mean_bits() for module in modules]).mean()


def train(name, settings):
    torch.manual_seed(0)
    inputs, weights, target = regression()
    cls = learned_widths_class(name)
    options = cls.Settings(**settings)
    modules = [cls.of(w, legal=LEGAL, group=1, start=8, settings=options) for w in weights]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    controller = SizeController(TARGET_BITS)
    optimizer = torch.optim.Adam(
        [
            {"params": params, "lr": 1e-3},
            {"params": [p for m in modules for p in m.parameters()], "lr": 0.1},
        ]
    )
    for step in range(STEPS):
        share = step / STEPS
        for module in modules:
            module.progress(share)
        optimizer.zero_grad()
        bits = mean_bits(modules)
        loss = loss_of(modules, params, inputs, target) + controller(bits, share)
        (loss + sum(m.penalty() for m in modules)).backward()
        optimizer.step()
    return modules


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_layer_that_matters_gets_at_least_as_many_bits(name, settings):
    important, other = (sum(m.bit_widths()) / 8 for m in train(name, settings))
    assert important >= other
    assert 2 <= (important + other) / 2 < 6


def test_learned_steps_ask_for_more_bits_where_more_is_at_stake():
    torch.manual_seed(0)
    inputs, weights, target = regression()
    cls = learned_widths_class("limpq")
    legal = (2, 3, 4, 5, 6)
    modules = [cls.of(w, legal=legal, start=4) for w in weights]
    optimizer = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        for width in (*legal, None):
            for module in modules:
                module.select(width)
            loss_of(modules, weights, inputs, target).backward()
        optimizer.step()
    tables = [module.importance() for module in modules]
    pairs = [(a, b) for a in range(len(legal)) for b in range(len(legal))]
    within = [(a, b) for a, b in pairs if legal[a] + legal[b] <= 2 * TARGET_BITS]
    first, second = min(within, key=lambda ab: float(tables[0][ab[0]] + tables[1][ab[1]]))
    assert legal[first] > legal[second]
    for module, at in zip(modules, (first, second), strict=True):
        module.freeze((legal[at],) * 8)
        assert module.mean_bits().tolist() == [legal[at]] * 8
