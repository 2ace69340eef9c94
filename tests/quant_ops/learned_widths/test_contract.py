"""What every method of learning widths has to do."""

import copy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from quant_ops.errors import UsageError
from quant_ops.learned_widths.table import LEARNED_WIDTHS, learned_widths_class

ALL = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)
METHODS = sorted(LEARNED_WIDTHS)
LEARNERS = [name for name in METHODS if learned_widths_class(name).learns]


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * 0.3


def make(name, weight, legal=ALL, group=1, start=4, seed=None, **settings):
    cls = learned_widths_class(name)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return cls.of(
        weight,
        legal=legal,
        group=group,
        start=start,
        settings=cls.Settings(**settings),
        generator=generator,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("legal", [ALL, (2, 4, 8), (4,), (0, 2, 3, 8)])
@pytest.mark.parametrize(("group", "n_groups"), [(None, 1), (1, 6), (4, 2)])
class TestShapes:
    def test_weights_keep_their_shape_and_widths_are_legal(
        self, name, legal, group, n_groups, weight
    ):
        module = make(name, weight, legal, group)
        assert module.n_groups == n_groups
        assert module(weight).shape == weight.shape
        assert module.mean_bits().shape == module.live().shape == (6,)
        assert module.penalty().shape == ()
        widths = module.bit_widths()
        assert len(widths) == 6
        assert set(widths) <= set(module.choices) <= set(legal)
        assert len(set(widths[:4])) <= (4 if group == 1 else 1)

    def test_start_is_the_nearest_width_that_can_be_chosen(
        self, name, legal, group, n_groups, weight
    ):
        module = make(name, weight, legal, group, start=4)
        nearest = min(module.choices, key=lambda width: abs(width - 4))
        assert module.bit_widths() == (nearest,) * 6

    def test_every_parameter_and_the_weight_get_a_gradient(
        self, name, legal, group, n_groups, weight
    ):
        module = make(name, weight, legal, group)
        weight.requires_grad_()
        loss = module(weight).square().sum() + module.mean_bits().sum() + module.penalty()
        loss.backward()
        assert weight.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_the_forward_pass_alone_reaches_every_parameter(
        self, name, legal, group, n_groups, weight, share
    ):
        module = make(name, weight, legal, group)
        module.progress(share)
        module(weight).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_frozen_widths_are_the_expected_ones(self, name, legal, group, n_groups, weight):
        module = make(name, weight, legal, group)
        module.progress(1.0)
        assert module.mean_bits().tolist() == pytest.approx(module.bit_widths())
        assert module.live().tolist() == [float(width > 0) for width in module.bit_widths()]
        assert torch.equal(module(weight), module.eval()(weight))


@pytest.mark.parametrize("name", METHODS)
def test_each_row_has_at_most_as_many_values_as_its_width_has_levels(name, weight):
    from quant_ops.bit_widths import LEVELS

    module = make(name, weight)
    for width in module.choices:
        module.freeze((width,) * 6)
        for row in module(weight).detach():
            assert len(row.unique()) <= max(1, LEVELS[width])
            assert width > 0 or not row.any()


@pytest.mark.parametrize("name", METHODS)
def test_wide_weights_are_nearly_the_real_ones(name, weight):
    module = make(name, weight, start=8).eval()
    assert (module(weight) - weight).abs().max() < 0.02 * weight.abs().max()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_state_comes_back_from_a_safetensors_file(name, share, weight):
    module = make(name, weight, start=[2, 3, 4, 5, 6, 8])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    module.progress(share)
    other = make(name, torch.zeros_like(weight), start=8)
    other.load_state_dict(load(save(module.state_dict())))
    assert other.bit_widths() == module.bit_widths()
    assert torch.equal(other.mean_bits(), module.mean_bits())
    torch.manual_seed(0)
    expected = module(weight)
    torch.manual_seed(0)
    assert torch.equal(other(weight), expected)


@pytest.mark.parametrize("name", METHODS)
def test_repeats_under_one_seed(name, weight):
    first, second = (make(name, weight, seed=3) for _ in range(2))
    state = torch.get_rng_state()
    for _ in range(3):
        assert torch.equal(first(weight), second(weight))
    assert torch.equal(torch.get_rng_state(), state)  # with a generator of its own
    default = make(name, weight)
    torch.manual_seed(5)
    expected = default(weight)
    torch.manual_seed(5)
    assert torch.equal(default(weight), expected)


@pytest.mark.parametrize("name", METHODS)
def test_eval_mode_has_no_noise(name, weight):
    module = make(name, weight).eval()
    assert torch.equal(module(weight), module(weight))


@pytest.mark.parametrize("name", METHODS)
def test_autocast_and_narrow_types_change_only_the_type(name, weight):
    module = make(name, weight).eval()
    expected = module(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(weight), expected)
    narrow = weight.bfloat16()
    assert module(narrow).dtype == torch.bfloat16
    assert torch.equal(module(narrow), module(narrow.float()).bfloat16())


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_stays_behind_on_another_device(name, weight):
    module = make(name, weight).to("meta")
    module(weight.to("meta"))
    assert module.mean_bits().device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in module.state_dict().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_runs_on_a_gpu(name, weight):
    module = make(name, weight).to("cuda")
    expected = make(name, weight).eval()(weight)
    module(weight.cuda()).square().sum().backward()
    assert torch.allclose(module.eval()(weight.cuda()).cpu(), expected, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_is_independent(name, weight):
    module = make(name, weight)
    other = copy.deepcopy(module)
    other.progress(1.0)
    assert not module.frozen
    assert other.frozen


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("legal", [ALL, (0, 2, 4, 8), (2, 4, 8), (3, 5)])
def test_with_the_size_alone_widths_fall_to_the_narrowest(name, legal, weight):
    if name == "bayesian-bits" and legal == (3, 5):
        return
    module = make(name, weight, legal, start=max(legal))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    steps, means = 300, []
    for step in range(steps):
        optimizer.zero_grad()
        mean = module.mean_bits().mean()
        mean.backward()
        optimizer.step()
        module.progress(0.7 * step / steps)
        means.append(float(mean.detach()))
    tolerance = 0.02 if name != "dqa" else 0.3  # colder attention weighs two choices otherwise
    assert all(b <= a + tolerance for a, b in pairwise(means))
    assert means[-1] < means[0]
    assert means[-1] == pytest.approx(module.choices[0], abs=0.5)
    module.progress(1.0)
    assert module.bit_widths() == (module.choices[0],) * 6


@pytest.mark.parametrize("name", METHODS)
def test_freezing_takes_only_widths_that_the_groups_can_have(name, weight):
    module = make(name, weight, group=3)
    wide = module.choices[-1]
    module.freeze((wide,) * 6)
    assert module.bit_widths() == (wide,) * 6
    with pytest.raises(ValueError, match="one group"):
        module.freeze((wide, module.choices[-2], *(wide,) * 4))
    with pytest.raises(ValueError, match="widths"):
        module.freeze((9,) * 6)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_goes_back_unfreezes(name, weight):
    module = make(name, weight)
    module.progress(1.0)
    module.progress(0.1)
    assert not module.frozen


def test_bad_input_is_refused(weight):
    cls = learned_widths_class("fracbits")
    with pytest.raises(ValueError, match=r"wanted a weight \(out, n\)"):
        cls.of(weight[0], legal=(2,))
    with pytest.raises(ValueError, match="legal widths"):
        cls.of(weight, legal=(2, 9))
    with pytest.raises(ValueError, match="legal widths"):
        cls.of(weight, legal=(0,))
    with pytest.raises(ValueError, match="group"):
        cls.of(weight, legal=(2,), group=0)
    with pytest.raises(ValueError, match="2 starting widths for 6 groups"):
        cls.of(weight, legal=(2,), group=1, start=(2, 2))
    with pytest.raises(UsageError, match="choose from"):
        learned_widths_class("hawq")


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_zeros_have_finite_gradients(name):
    weight = torch.zeros(3, 8, requires_grad=True)
    module = make(name, weight.detach())
    module(weight).square().sum().backward()
    assert weight.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
