"""Each method against its formulas."""

import math

import pytest
import torch

from quant_ops.bit_widths import LEVELS
from quant_ops.learned_widths import gates
from quant_ops.learned_widths.base import bounded
from quant_ops.learned_widths.bayesian_bits import BayesianBits, BayesianBitsSettings
from quant_ops.learned_widths.csq import CSQ, CSQSettings
from quant_ops.learned_widths.diffq import DiffQ, DiffQSettings
from quant_ops.learned_widths.dqa import DQA, DQASettings
from quant_ops.learned_widths.fracbits import FracBits
from quant_ops.learned_widths.limpq import LIMPQ, OUTLIER
from quant_ops.learned_widths.self_compressing import SelfCompressing
from quant_ops.quantizers import fake_quantize

ALL = (0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def upstream():
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(2))


def slope(function, parameter, at, step=1e-3):
    """Central difference of function() with respect to one entry of a parameter."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[at] += sign * step
            ends.append(float(function()))
            parameter[at] -= sign * step
    return (ends[0] - ends[1]) / (2 * step)


# gates


@pytest.mark.parametrize("phi", [-2.0, 0.0, 1.5])
def test_gates_are_open_as_often_as_the_formula_says(phi):
    z = gates.sample(torch.full((40_000,), phi), torch.Generator().manual_seed(0))
    expected = 1 / (1 + math.exp(-phi) * (1 / 11) ** (2 / 3))
    assert float(gates.open_probability(torch.tensor(phi))) == pytest.approx(expected, rel=1e-5)
    assert float((z > 0).float().mean()) == pytest.approx(expected, abs=0.01)
    # symmetric: closed at phi is fully open at -phi
    fully = 1 - float(gates.open_probability(torch.tensor(-phi)))
    assert float((z == 1).float().mean()) == pytest.approx(fully, abs=0.01)


def test_a_gate_is_kept_unless_it_is_likely_closed():
    threshold = gates.TEMPERATURE * math.log(1 / 11) + math.log(0.66 / 0.34)
    phi = torch.tensor([threshold - 1e-3, threshold + 1e-3])
    assert gates.is_open(phi).tolist() == [False, True]


def test_a_bounded_value_passes_only_gradients_that_lead_back():
    x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    bounded(x, 0.0, 1.0).backward(torch.tensor([1.0, 1.0, 1.0]))
    assert x.grad.tolist() == [0.0, 1.0, 1.0]
    x.grad = None
    bounded(x, 0.0, 1.0).backward(torch.tensor([-1.0, -1.0, -1.0]))
    assert x.grad.tolist() == [-1.0, -1.0, 0.0]


# DiffQ


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("weight_range", ["channel", "layer"])
def test_diffq_noise_has_mean_0_and_the_variance_of_rounding(noise, weight_range):
    weight = torch.linspace(-1, 1, 20_001).repeat(2, 1) * torch.tensor([[1.0], [3.0]])
    settings = DiffQSettings(weight_range=weight_range, noise=noise)
    module = DiffQ.of(weight, legal=(2, 3, 4), start=3, settings=settings)
    torch.manual_seed(0)
    error = (module(weight) - weight).detach()
    ranges = torch.tensor([2.0, 6.0] if weight_range == "channel" else [6.0, 6.0])
    steps = ranges / (2**3 - 1)
    assert torch.allclose(error.mean(dim=1) / steps, torch.zeros(2), atol=0.01)
    assert torch.allclose(error.var(dim=1) / (steps**2 / 12), torch.ones(2), rtol=0.03)


def test_diffq_gradients_are_true_ones(weight, upstream):
    module = DiffQ.of(weight, legal=ALL, group=2, start=4)

    def loss():
        torch.manual_seed(3)
        return (module(weight) * upstream).sum()

    weight.requires_grad_()
    with torch.no_grad():
        module.phi.fill_(0.3)
    loss().backward()
    assert float(module.logit.grad[1]) == pytest.approx(slope(loss, module.logit, 1), rel=0.02)
    largest = int(weight[0].abs().argmax())
    assert float(weight.grad[0, largest]) == pytest.approx(slope(loss, weight, (0, largest)), 0.02)
    for group in range(2):  # 0 where a gate's sample is 0 or 1
        expected = slope(loss, module.phi, group)
        assert float(module.phi.grad[group]) == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_diffq_expects_the_width_times_the_probability_of_being_there(weight):
    module = DiffQ.of(weight, legal=(0, 2, 8), group=1, start=8)
    with torch.no_grad():
        module.logit.fill_(0.0)
        module.phi.fill_(0.0)
    probability = 1 / (1 + (1 / 11) ** (2 / 3))
    assert module.mean_bits().tolist() == pytest.approx([5 * probability] * 4)
    assert module.live().tolist() == pytest.approx([probability] * 4)
    with torch.no_grad():
        module.phi[0] = -10.0
    assert module.bit_widths()[0] == 0
    assert not module.eval()(weight)[0].any()


@pytest.mark.parametrize("width", [1, 1.6, 2, 5])
def test_diffq_ends_on_levels_that_fill_the_range(width, weight):
    module = DiffQ.of(weight, legal=ALL, start=width).eval()
    scheme = "mid_tread" if width == 1.6 else "mid_rise"
    step = 2 * weight.abs().amax(dim=1, keepdim=True) / (LEVELS[width] - 1)
    expected = fake_quantize(weight, step, width, scheme)
    assert torch.allclose(module(weight), expected, atol=1e-5)


# FracBits


@pytest.mark.parametrize("width", ALL)
def test_fracbits_is_the_quantizer_itself_at_a_legal_width(width, weight):
    module = FracBits.of(weight, legal=ALL, group=1, start=width)
    assert torch.allclose(module(weight), module.eval()(weight), atol=1e-7)
    assert module.mean_bits().tolist() == pytest.approx([width] * 4)


def test_fracbits_mixes_its_neighbours_and_its_gradient_is_a_true_one(weight, upstream):
    module = FracBits.of(weight, legal=(0, 1.6, 4), start=1.6)
    with torch.no_grad():
        module.width.fill_(2.2)
    ends = []
    for width in (1.6, 4):
        module.freeze((width,) * 4)
        ends.append(module(weight).detach())
    module.progress(0)
    assert torch.allclose(module(weight), 0.75 * ends[0] + 0.25 * ends[1], atol=1e-6)
    (module(weight) * upstream).sum().backward()
    expected = float(((ends[1] - ends[0]) * upstream).sum() / 2.4)
    assert float(module.width.grad) == pytest.approx(expected, rel=1e-4)


def test_steps_get_the_gradient_of_learned_step_sizes():
    weight = torch.tensor([[0.2, 0.9, -2.6, 9.0, -9.0]], requires_grad=True)
    module = FracBits.of(weight.detach(), legal=(3,), start=3)
    module.grids.offset.zero_()
    with torch.no_grad():
        module.grids.log_step.fill_(0.0)
    module(weight).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 0, 0]]
    expected = (0 - 0.2) + (1 - 0.9) + (-3 + 2.6) + 3 - 4  # code - w/s inside, code outside
    assert float(module.grids.log_step.grad) == pytest.approx(expected, abs=1e-5)


# DQA


def test_dqa_temperature_falls_geometrically_and_sharpens_the_attention(weight):
    first = DQA.of(weight, legal=(2, 4, 8), group=1, start=4).attention()
    assert first.argmax(dim=1).tolist() == [1] * 4
    assert bool((first.amax(dim=1) > 2 * first.amin(dim=1)).all())
    settings = DQASettings(first_temperature=100)
    module = DQA.of(weight, legal=(2, 4, 8), group=1, start=4, settings=settings)
    first = module.attention()
    assert torch.allclose(first, torch.full_like(first, 1 / 3), atol=0.01)
    alpha = torch.tensor([0.1, 0.7, -0.2])
    with torch.no_grad():
        module.alpha.copy_(alpha.expand(4, 3))
    for share in (0.0, 0.3, 0.75):
        module.progress(share)
        temperature = 100 ** (1 - share) * 0.03**share
        expected = torch.softmax(alpha / alpha.std(correction=0) / temperature, dim=0)
        assert torch.allclose(module.attention()[0], expected, atol=1e-5)
    module.progress(1.0)
    assert module.bit_widths() == (4,) * 4


def test_dqa_penalty_weighs_the_choices_by_powers_of_four(weight):
    module = DQA.of(weight, legal=(0, 2, 4, 8), settings=DQASettings(price=2.0))
    a = module.attention()[0]
    assert module.penalty().item() == pytest.approx(2 * (a[1] + 4 * a[2] + 16 * a[3]).item())


# Bayesian Bits


def test_bayesian_bits_nests_its_grids(weight):
    module = BayesianBits.of(weight, legal=(2, 4, 8), start=8)
    largest = module.log_range.exp()[:, None]
    for width in (2, 4, 8):
        module.freeze((width,) * 4)
        codes = module(weight) / (2 * largest / (2**width - 1))
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        clipped = weight.clamp(-largest, largest)
        half_step = largest / (2**width - 1)
        assert ((module(weight) - clipped).abs() <= half_step * 1.01).all()


def test_bayesian_bits_expects_the_closed_form(weight):
    module = BayesianBits.of(weight, legal=(0, 2, 4, 8), settings=BayesianBitsSettings(prior=0.5))
    with torch.no_grad():
        module.phi.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
    q2, q4, q8 = (1 / (1 + math.exp(-phi) * (1 / 11) ** (2 / 3)) for phi in (1.0, 0.0, -1.0))
    stored = 2 * q2 * (1 - q4) + 4 * q2 * q4 * (1 - q8) + 8 * q2 * q4 * q8
    assert module.mean_bits().tolist() == pytest.approx([stored] * 4)
    prior = 2 * q2 + 4 * q2 * q4 + 8 * q2 * q4 * q8
    assert module.penalty().item() == pytest.approx(0.5 * prior)


def test_bayesian_bits_multiplies_its_gates(weight, upstream):
    module = BayesianBits.of(weight, legal=(0, 2, 4, 8), start=8)
    with torch.no_grad():
        module.phi.copy_(torch.tensor([[0.2, 0.1, 0.0]]))
    torch.manual_seed(4)
    z2, z4, z8 = gates.sample(module.phi)[0].tolist()
    x2, e4, e8 = module.terms(weight)
    torch.manual_seed(4)
    assert torch.allclose(module(weight), z2 * (x2 + z4 * (e4 + z8 * e8)), atol=1e-6)


def test_bayesian_bits_stores_its_coarsest_grid_as_ternary_where_it_can(weight):
    assert BayesianBits.of(weight, legal=ALL).choices == (0, 1.6, 4, 8)
    assert BayesianBits.of(weight, legal=(2, 3, 4)).choices == (2, 4)
    with pytest.raises(ValueError, match="needs one of"):
        BayesianBits.of(weight, legal=(3, 5))


# self-compressing


def test_self_compressing_is_the_formula(weight):
    module = SelfCompressing.of(weight, legal=(0, 2, 3, 4, 5, 6, 7, 8), group=1, start=(2, 3, 4, 8))
    step = torch.exp2(module.exponent)[:, None]
    bits = torch.tensor([2.0, 3, 4, 8])[:, None]
    clamped = torch.minimum(torch.maximum(weight / step, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    assert torch.allclose(module(weight), step * torch.round(clamped), atol=1e-6)


@pytest.mark.parametrize(("start", "width"), [(3, 3.0), (0, 0.2)])
def test_self_compressing_bits_get_the_gradient_of_the_limits(start, width):
    weight = torch.tensor([[0.4, 5.0, -7.0]])
    module = SelfCompressing.of(weight, legal=(0, 2, 3, 4), start=start)
    with torch.no_grad():
        module.exponent.fill_(0.0)
        module.width.fill_(width)
    module(weight).mul(torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    moved = math.log(2) * 2 ** (width - 1)
    inside = moved if start == 0 else 0  # a removed channel clips every weight
    assert float(module.width.grad) == pytest.approx(inside + 10 * moved - 100 * moved, rel=1e-4)


# CSQ and BSQ


@pytest.mark.parametrize("gate", ["sigmoid", "l1"])
@pytest.mark.parametrize("width", [1.6, 3, 4, 8])
def test_bit_planes_give_integers_exactly_when_gates_are_hard(width, gate):
    n_planes = round(width) - 1
    codes = torch.arange(-(2**n_planes) + 1, 2**n_planes).float()[None]
    module = CSQ.of(codes, legal=ALL, start=width, settings=CSQSettings(gate=gate))
    with torch.no_grad():
        module.log_range.fill_(math.log(2**n_planes * (1 - 2**-7.0)))  # seven planes' worth
    module.progress(1.0)
    assert module.bit_widths() == (width,)
    assert torch.allclose(module(codes), codes, atol=1e-5)
    terms = module.terms(codes)
    assert torch.allclose(sum(terms), codes, atol=1e-5)  # what the others add is 0


def test_bit_plane_prefixes_round_to_nearest(weight):
    module = CSQ.of(weight, legal=ALL, start=8)
    inside = weight.clamp(-0.5, 0.5)
    with torch.no_grad():
        module.log_range.fill_(math.log(127 / 128))
    for width, step in ((3, 0.25), (5, 0.0625)):
        module.freeze((width,) * 4)
        assert torch.allclose(module(inside), (inside / step).round() * step, atol=1e-5)


def test_csq_gates_sharpen_and_multiply_their_planes(weight, upstream):
    module = CSQ.of(weight, legal=(0, 3, 4), group=2, start=4)
    with torch.no_grad():
        module.gate.copy_(torch.tensor([[0.4, 0.1], [0.2, -0.3]]))
    module.progress(0.5)
    sharpness = math.sqrt(3.0 * 40.0)
    expected = torch.sigmoid(sharpness * module.gate.detach())
    assert torch.allclose(module.gates(), expected, atol=1e-6)
    bits = expected @ torch.tensor([3.0, 1.0])
    assert module.mean_bits().tolist() == pytest.approx(bits.repeat_interleave(2).tolist())

    def loss():
        return (module(weight) * upstream).sum()

    loss().backward()
    expected = slope(loss, module.gate, (1, 1))
    assert float(module.gate.grad[1, 1]) == pytest.approx(expected, rel=0.02)
    assert module.bit_widths() == (4, 4, 3, 3)


def test_a_plane_counts_no_more_than_those_above_it(weight):
    module = CSQ.of(weight, legal=(0, 3, 4, 5), start=5)
    with torch.no_grad():
        module.gate.copy_(torch.tensor([[0.5, -1.0, 1.0]]))
    kept = module.kept()[0]
    assert kept[2] == kept[1] < kept[0]
    assert module.bit_widths() == (3,) * 4


def test_bsq_gates_are_whole_in_the_forward_pass_and_real_in_the_size(weight):
    module = CSQ.of(weight, legal=(0, 3, 4), settings=CSQSettings(gate="l1", price=0.1))
    with torch.no_grad():
        module.gate.copy_(torch.tensor([[0.9, 0.4]]))
    assert torch.equal(module(weight), module.terms(weight)[0])
    assert module.mean_bits().tolist() == pytest.approx([3 * 0.9 + 0.4] * 4)
    assert module.penalty().item() == pytest.approx(0.1 * 0.65)
    assert module.bit_widths() == (3,) * 4


# LIMPQ


def test_limpq_marks_steps_that_are_out_of_order(weight):
    module = LIMPQ.of(weight, legal=(0, 2, 3, 4), group=2)
    assert module.choices == (2, 3, 4)
    with torch.no_grad():
        module.grids.log_step.copy_(torch.tensor([[4.0, 2.0, 1.0]]).log().expand(4, 3))
        module.grids.log_step[2:, 0] = math.log(1.0)
    assert module.group_importance()[0].tolist() == pytest.approx([4, 2, 1])
    assert module.group_importance()[1].tolist() == pytest.approx([OUTLIER, 2, 1])
    assert module.importance().tolist() == pytest.approx([2.5, 2, 1])


def test_limpq_trains_the_steps_of_the_selected_width_alone(weight):
    module = LIMPQ.of(weight, legal=(2, 3, 4))
    module.select(3)
    module(weight).square().sum().backward()
    moved = module.grids.log_step.grad.abs().sum(dim=0) > 0
    assert moved.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="not one of"):
        module.select(8)
