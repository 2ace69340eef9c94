"""Losses of single channels against the losses of networks with one channel quantized."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from quant_ops.bank import WeightBank
from quant_ops.candidate import LayerQuant
from quant_ops.channel_losses import channel_losses
from quant_ops.distill import kl_loss
from quant_ops.executor import Executor
from quant_ops.sensitivity import gaussian_gradient, sampled_label_gradient
from search.capture import trace


def one_channel(bank, name, channel, width):
    """The float parameters with one output channel of a layer at a width."""
    layer = bank.graph.layer_of[name]
    quantized = bank.layer(name, LayerQuant((width,)))
    params = {k: v.clone() for k, v in bank.float_params.items()}
    params[layer.weight][channel] = quantized.weight(layer)[channel]
    params[layer.bias][channel] = quantized.bias_values()[channel]
    return params


def test_each_channel_costs_what_a_network_with_it_alone_quantized_loses():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[-1].weight *= 6
        model[2].weight[::2] *= 4
    x = torch.randn(48, 3, 8, 8)
    traced = trace(model.eval(), (x,))
    bank = WeightBank(traced.graph, traced.params, None)
    batches = [((x[:20],), None), ((x[20:],), None)]
    widths = {layer.name: (3.0, 5.0) for layer in traced.graph.layers}
    found = channel_losses(bank, batches, widths, sampled_label_gradient, logits=True)
    executor = Executor(traced.graph)
    reference = executor(traced.params, (x,))
    exact, predicted = [], []
    for name, losses in found.items():
        for channel, at in np.ndindex(losses.shape):
            params = one_channel(bank, name, channel, widths[name][at])
            exact.append(float(kl_loss(executor(params, (x,)), reference)))
            predicted.append(losses[channel, at])
    assert spearmanr(exact, predicted).statistic > 0.97
    assert np.median(np.array(predicted) / np.array(exact)) == pytest.approx(1, abs=0.1)


def test_squared_outputs_have_a_closed_form():
    torch.manual_seed(1)
    x = torch.randn(4000, 6)
    traced = trace(nn.Sequential(nn.Linear(6, 3)).eval(), (x,))
    bank = WeightBank(traced.graph, traced.params, None)
    (found,) = channel_losses(
        bank, [((x,), None)], {"0": (3.0,)}, gaussian_gradient, logits=False
    ).values()
    executor = Executor(traced.graph)
    for channel in range(3):
        (a,), (b,) = (
            executor(p, (x,)) for p in (one_channel(bank, "0", channel, 3.0), bank.float_params)
        )
        wanted = 0.5 * float((a - b).square().sum(dim=1).mean())
        assert found[channel, 0] == pytest.approx(wanted, rel=0.15)


def test_the_channels_of_an_embedding_are_its_rows():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, words):
            return self.out(self.table(words)).sum(dim=1)

    torch.manual_seed(2)
    words = torch.randint(0, 6, (3000, 5))  # the last row is never met
    traced = trace(Words().eval(), (words,))
    bank = WeightBank(traced.graph, traced.params, None)
    (found,) = channel_losses(
        bank, [((words,), None)], {"table": (3.0,)}, gaussian_gradient, logits=False
    ).values()
    executor = Executor(traced.graph)
    quantized = bank.layer("table", LayerQuant((3.0,))).weight(traced.graph.layer_of["table"])
    for row in range(7):
        params = {k: v.clone() for k, v in bank.float_params.items()}
        params["table.weight"][row] = quantized[row]
        (a,), (b,) = (executor(p, (words,)) for p in (params, bank.float_params))
        wanted = 0.5 * float((a - b).square().sum(dim=1).mean())
        assert found[row, 0] == pytest.approx(wanted, rel=0.15)
    assert found[6, 0] == 0
