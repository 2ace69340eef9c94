import pytest
import torch
from torch import nn

from quant_ops.executor import Executor
from search.capture import trace


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return model.eval()


def assert_exact(model, traced, shape):
    x = torch.randn(3, *shape)
    with torch.no_grad():
        wanted = model.double()(x.double()).float()
    (found,) = Executor(traced.graph)(traced.params, (x,))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda b: nn.Conv2d(4, 6, 3, bias=b), nn.BatchNorm2d, (4, 5, 5)),
        (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (4, 5, 5)),
        (lambda b: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (4, 5, 5)),
        (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (4,)),
        (lambda b: nn.Conv1d(4, 6, 2, bias=b), nn.BatchNorm1d, (4, 5)),
    ],
)
def test_a_norm_after_a_layer_becomes_part_of_it(layer, norm, shape, bias, affine):
    model = randomised(nn.Sequential(layer(bias), norm(6, affine=affine)))
    traced = trace(model, [torch.randn(2, *shape)])
    assert [node.op.split(".")[0] for node in traced.graph.nodes[1:]] in (
        ["conv2d"], ["conv_transpose2d"], ["linear"], ["conv1d"]
    )  # fmt: skip
    (only,) = traced.graph.layers
    assert only.bias is not None
    assert traced.params[only.bias].shape == (6,)
    assert_exact(model, traced, shape)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x)).relu()))


@pytest.mark.parametrize("make", [UsedTwice, Shared])
def test_a_norm_that_cannot_be_folded_becomes_a_scale_and_a_shift(make):
    model = randomised(make())
    traced = trace(model, [torch.randn(2, 4, 3, 3)])
    ops = [node.op for node in traced.graph.nodes]
    assert "bitfront.channel_affine" in ops
    assert not any("batch_norm" in op for op in ops)
    assert_exact(model, traced, (4, 3, 3))


def test_a_norm_over_a_sequence_of_linear_outputs_is_not_folded_wrongly():
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    traced = trace(model, [torch.randn(2, 5, 4)])
    assert_exact(model, traced, (5, 4))


def test_every_searched_layer_ends_with_a_bias_of_its_own():
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    traced = trace(model, [torch.randn(2, 4, 3, 3)])
    biases = [layer.bias for layer in traced.graph.layers]
    assert biases == ["0.bias", "2.bias"]
    assert traced.params["0.bias"].tolist() == [0] * 6


def test_layers_that_share_a_bias_get_one_each():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    model = randomised(model)
    traced = trace(model, [torch.randn(2, 4)])
    assert len({layer.bias for layer in traced.graph.layers}) == 2
    assert_exact(model, traced, (4,))
