"""Rescalings are counted as the circuits that are laid out for them."""

import numpy as np
import pytest

from cost_models.fpga.quantizer import Operand, bits, crossed, digits_of, quantizer
from quant_ops.narrow import NarrowRescale


def count(multipliers, offset, shift, low, high, *operands):
    rescale = NarrowRescale(multipliers, offset, shift, 0, low, high)
    return quantizer(rescale, [Operand(*operand) for operand in operands])


def test_digits_of_a_multiplier_are_its_powers_of_two_from_the_highest():
    for value in range(1, 400):
        places = digits_of(value)
        assert sum(sign << place for place, sign in places) == value
        assert places == sorted(places, reverse=True)


def test_a_register_stands_after_every_second_adder():
    assert [crossed(0, depth) for depth in range(6)] == [0, 0, 0, 1, 1, 2]
    assert crossed(2, 3) == 1
    assert crossed(3, 4) == 0


def test_a_power_of_two_is_wires_and_a_clamp():
    found = count((1,), 8, 4, 0, 15, (0, 255, 0))  # (a + 8) >> 4 reaches 16
    assert (found.product_bits, found.product_registers) == (0, 0)
    assert found.offset_bits == 9 - 3
    assert (found.code_bits, found.clamp_bits, found.excess_bits) == (4, 4, 1)
    assert found.depth == 1
    assert count((1,), 0, 4, 0, 15, (0, 255, 0)).clamp_bits == 0


def test_a_sign_clamps_at_0_without_an_adder_and_other_limits_take_one_each():
    assert count((1,), 0, 2, 0, 15, (-60, 63, 2)).depth == 2
    assert count((1,), 0, 2, 0, 7, (-60, 63, 2)).depth == 3
    assert count((1,), 0, 2, -4, 3, (-60, 63, 2)).depth == 4


def test_only_what_is_read_later_is_held():
    # 5 a: the accumulator of 11 bits crosses to the sum; one depth later the sum ends a stage, and
    # a sign and 4 bits of code cross to the clamp.
    one = count((5,), 64, 7, 0, 15, (-100, 900, 2))
    assert (one.depth, one.product_registers, one.clamp_registers) == (4, 11, 0)
    later = count((5,), 64, 7, 0, 15, (-100, 900, 3))
    assert (later.depth, later.product_registers, later.clamp_registers) == (5, 0, 1 + 4)
    # 21 a = (16 + 4) a + a: both wait for the last sum, to whose two lowest bits nothing is added.
    two = count((21,), 512, 10, 0, 15, (0, 700, 1))
    assert two.product_registers == bits(0, 5 * 700) + bits(0, 700) - 2
    # Where those are read the four lowest bits of 17 a are bits of a, and held once.
    three = count((273,), 1, 12, 0, 15, (0, 200, 1))
    assert three.product_registers == bits(0, 17 * 200) + bits(0, 200) - 4


def test_two_operands_are_multiplied_each_and_added():
    one = count((3,), 4, 3, 0, 15, (0, 15, 0))
    both = count((3, 5), 4, 3, 0, 15, (0, 15, 0), (0, 15, 0))
    assert both.product_bits > one.product_bits + bits(0, 75)
    assert both.depth == 2  # the products, their sum
    assert count((3, 5), 4, 3, 0, 7, (0, 15, 0), (0, 15, 0)).depth == 3  # and a clamp
    assert count((0, 5), 4, 3, 0, 7, (0, 15, 0), (0, 15, 0)).depth == 2
    assert count((0,), 9, 0, 0, 15, (0, 15, 0)).code_bits == 0


@pytest.mark.parametrize("seed", range(8))
def test_depth_and_width_are_those_of_da4ml(seed):
    trace = pytest.importorskip("da4ml.trace", reason="da4ml (extra fpga) is not installed")
    from cost_models.fpga.symbols import clamped_floor

    rng = np.random.default_rng(seed)
    low, high = (int(v) for v in (-rng.integers(0, 500), rng.integers(1, 900)))
    multiplier, shift = int(rng.integers(1, 200)), int(rng.integers(3, 10))
    lowest, offset = -8 * (seed % 2), int(rng.integers(0, 2**shift))
    rescale = NarrowRescale((multiplier,), offset, shift, 0, lowest, lowest + 15)
    inputs = trace.FixedVariableArray.from_lhs(np.array([low]), np.array([high]), np.ones(1))
    code = clamped_floor(rescale, [inputs[0]])
    found = quantizer(rescale, [Operand(low, high, 0)])
    assert float(code.latency) == found.depth
    assert sum(code.kif) >= found.code_bits
    logic = trace.comb_trace(inputs, [code])
    sums = rng.integers(low, high + 1, (50, 1))
    assert np.array_equal(np.asarray(logic.predict(sums.astype(float))), rescale(sums))
