"""Two processes that train one module by halves of a batch keep one module."""

import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from quant_ops.hgq import HGQLinear, penalty
from quant_ops.learned_widths.base import LearnedWidths
from quant_ops.learned_widths.table import LEARNED_WIDTHS, learned_widths_class
from quant_ops.qat.weights import LearnedStep

N_IN, N_OUT, BATCH, STEPS = 6, 8, 12, 3


class _Quantized(nn.Module):
    """A linear layer behind a module for its weights, and what that module adds to the loss."""

    def __init__(self, weight, quantizer):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.quantizer = quantizer

    def forward(self, x):
        y = functional.linear(x, self.quantizer(self.weight))
        if not isinstance(self.quantizer, LearnedWidths):
            return y, y.new_zeros(())
        return y, self.quantizer.penalty() + 1e-3 * self.quantizer.mean_bits().sum()


class _HGQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = HGQLinear(N_IN, N_OUT)

    def forward(self, x):
        return self.layer(x), penalty(self.layer, beta=1e-4)


def networks():
    weight = 0.3 * torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(0))
    for name in sorted(LEARNED_WIDTHS):
        cls = learned_widths_class(name)
        yield name, _Quantized(weight, cls.of(weight, legal=(0, 2, 4, 8), group=1, start=4))
    widths = (0.0, 1.0, 1.6, 2.0, 3.0, 4.0, 4.0, 8.0)
    yield "lsq", _Quantized(weight, LearnedStep.from_weights(weight, widths))
    yield "hgq-layer", _HGQ()


def train(network, x, wanted, wrapped):
    """A few steps of gradient descent; the last ones with frozen widths."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for step in range(STEPS):
        torch.manual_seed(step)  # the noise of the weights is that of every process
        quantizer = getattr(network, "quantizer", None)
        if isinstance(quantizer, LearnedWidths):
            quantizer.progress(step / STEPS + 0.3)
        optimizer.zero_grad()
        y, more = wrapped(x)
        (functional.mse_loss(y, wanted) + more).backward()
        optimizer.step()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, N_IN, generator=generator), torch.randn(
        BATCH, N_OUT, generator=generator
    )


def one_process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    x, wanted = data()
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    ends = {}
    for name, network in networks():
        train(network.train(), x[half], wanted[half], DistributedDataParallel(network))
        ends[name] = network.state_dict()
    torch.save(ends, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_module_that_one_ends_with(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), tmp_path], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    x, wanted = data()
    for name, network in networks():
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
        train(network.train(), x, wanted, network)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-5, msg=name)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), sys.argv[2])
