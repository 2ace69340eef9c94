"""A captured network computes what the model computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from quant_ops.executor import Executor
from search.capture import trace


def randomised(model, seed=0):
    """Parameters and running statistics that are all different from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return model.eval()


class Function(nn.Module):
    """Submodules by name, and the forward function given."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self._forward(self, *inputs)


def conv_net(m, x):
    return m.fc(m.pool(m.bn(m.conv(x)).relu()).flatten(1))


def option_a(m, x):
    y = m.bn(m.conv(x))
    return (y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()


def attention(m, x):
    q, k, v = m.qkv(m.norm(x)).chunk(3, dim=-1)
    weights = (q @ k.transpose(1, 2) / 8**0.5).softmax(dim=-1)
    return x + m.out(weights @ v)


def squeeze_excite(m, x):
    s = torch.sigmoid(m.up(functional.silu(m.down(x.mean(dim=(2, 3), keepdim=True)))))
    return x * s


IMAGE, SERIES = (4, 4, 9, 9), (4, 6, 11)
ZOO = {
    "conv-bn": (
        lambda: Function(
            conv_net, conv=nn.Conv2d(4, 8, 3, bias=False), bn=nn.BatchNorm2d(8),
            pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 3),
        ),
        [IMAGE],
    ),
    "bn-first": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)), [IMAGE]),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(6, 8, 3, stride=2), nn.BatchNorm1d(8), nn.GELU()), [SERIES],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d(2)),
        [(4, 2, 4, 4, 4)],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False),
            nn.BatchNorm2d(6), nn.LeakyReLU(0.1),
        ),
        [IMAGE],
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        ),
        [IMAGE],
    ),
    "linear-bn": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()), [(4, 6)],
    ),
    "option-a": (
        lambda: Function(
            option_a, conv=nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
            bn=nn.BatchNorm2d(8),
        ),
        [IMAGE],
    ),
    "attention": (
        lambda: Function(
            attention, norm=nn.LayerNorm(8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)
        ),
        [(4, 5, 8)],
    ),
    "squeeze-excite": (
        lambda: Function(squeeze_excite, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1)), [IMAGE],
    ),
    "two-inputs": (
        lambda: Function(
            lambda m, a, b: {"sum": m.left(a) + m.right(b), "parts": [m.left(a), b]},
            left=nn.Linear(6, 5), right=nn.Linear(3, 5),
        ),
        [(4, 6), (4, 3)],
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)), [(4, 6)]),
}  # fmt: skip


def inputs_of(shapes, n=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n or s[0], *s[1:], generator=generator) for s in shapes]


def outputs_of(traced, inputs):
    outputs = Executor(traced.graph)(traced.params, tuple(inputs))
    return pytree.tree_unflatten(list(outputs), traced.out_spec)


def assert_same(found, wanted):
    found, found_spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(wanted)
    assert found_spec == wanted_spec
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_the_captured_network_computes_the_model_at_any_batch_size(name):
    make, shapes = ZOO[name]
    model = randomised(make())
    traced = trace(model, inputs_of(shapes))
    assert traced.static_batch is None
    assert not any("batch_norm" in node.op for node in traced.graph.nodes)
    with torch.no_grad():
        for n in (1, 2, 7):
            inputs = inputs_of(shapes, n)
            assert_same(outputs_of(traced, inputs), model(*inputs))


@pytest.mark.parametrize("n_examples", [1, 2, 3])
def test_examples_of_any_batch_size_will_do(n_examples):
    make, shapes = ZOO["conv-bn"]
    traced = trace(randomised(make()), inputs_of(shapes, n_examples))
    assert traced.static_batch is None
    assert traced.graph.nodes[0].shape == (1, 4, 9, 9)


def test_a_model_that_fixes_its_batch_is_captured_for_one_sample():
    model = randomised(
        Function(lambda m, x: m.fc(x.reshape(int(x.shape[0]), 6)), fc=nn.Linear(6, 2))
    )
    torch.manual_seed(0)
    fixed = Function(lambda m, x: m.fc(x.reshape(1, 6)), fc=nn.Linear(6, 2)).eval()
    assert trace(model, [torch.randn(3, 6)]).static_batch is None
    traced = trace(fixed, [torch.randn(3, 6)])
    assert traced.static_batch == 1
    x = torch.randn(1, 6)
    with torch.no_grad():
        assert_same(outputs_of(traced, [x]), fixed(x))


def test_a_shared_layer_is_one_layer_with_two_sites():
    model = randomised(Function(lambda m, x: m.fc(m.fc(x).relu()), fc=nn.Linear(6, 6)))
    traced = trace(model, [torch.randn(2, 6)])
    (layer,) = traced.graph.layers
    assert len(layer.sites) == 2
    assert layer.macs == 2 * 36
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert_same(outputs_of(traced, [x]), model(x))


def test_a_tied_embedding_is_one_layer():
    model = Function(
        lambda m, tokens: m.head(m.embedding(tokens).mean(dim=1)),
        embedding=nn.Embedding(9, 6), head=nn.Linear(6, 9, bias=False),
    )  # fmt: skip
    model.head.weight = model.embedding.weight
    model = randomised(model)
    tokens = torch.randint(0, 9, (3, 4))
    traced = trace(model, [tokens])
    (layer,) = traced.graph.layers
    assert layer.weight_shape == (9, 6)
    assert len(layer.sites) == 2
    assert layer.searchable
    assert traced.float_bytes == 9 * 6 * 4
    with torch.no_grad():
        assert_same(outputs_of(traced, [tokens]), model(tokens))


def test_what_cannot_be_quantized_has_a_reason():
    lstm = nn.LSTM(6, 4, batch_first=True)
    model = randomised(
        Function(lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=lstm, head=nn.Linear(4, 2))
    )
    x = torch.randn(3, 5, 6)
    traced = trace(model, [x])
    reasons = {layer.name: layer.reason for layer in traced.graph.layers}
    assert reasons["head"] == ""
    assert all("lstm runs in float" in r for name, r in reasons.items() if name != "head")
    with torch.no_grad():
        assert_same(outputs_of(traced, [x]), model(x))


def test_a_weight_that_another_operator_reads_stays_float():
    model = randomised(
        Function(lambda m, x: m.fc(x) * m.fc.weight.sum(), fc=nn.Linear(6, 6, bias=False))
    )
    traced = trace(model, [torch.randn(2, 6)])
    (layer,) = traced.graph.layers
    assert not layer.searchable
    assert "also reads its weight" in layer.reason


def test_the_model_is_left_as_it_was():
    model = ZOO["conv-bn"][0]().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, inputs_of([IMAGE]))
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_changing_the_model_afterwards_does_not_change_what_was_captured():
    model = randomised(nn.Sequential(nn.Linear(6, 3)))
    traced = trace(model, [torch.randn(2, 6)])
    before = {name: tensor.clone() for name, tensor in traced.params.items()}
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in traced.params.items())


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[1].running_var[1] = float("inf")
    with pytest.raises(UsageError, match=r"'1\.running_var' holds 1 NaN or infinite"):
        trace(model, [torch.randn(2, 6)])


def test_a_branch_on_values_is_located(capfd):
    def forward(m, x):
        if x.sum() > 0:
            return m.fc(x)
        return -m.fc(x)

    model = Function(forward, fc=nn.Linear(6, 3))
    with pytest.raises(UsageError, match=r"cannot capture Function at .*test_capture\.py.*line"):
        trace(model, [torch.randn(2, 6)])
    assert capfd.readouterr().err == ""


def test_an_operator_off_the_list_is_named_with_its_module():
    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    model = nn.Sequential(nn.Linear(3, 3), Inverse())
    with pytest.raises(UsageError, match=r"operator 'linalg_inv.*in module '1'.* not on the list"):
        trace(model, [torch.randn(2, 3, 3)])
