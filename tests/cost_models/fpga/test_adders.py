"""Adders of a constant matrix compute the product, and their widths hold every term."""

import numpy as np
import pytest

from cost_models.fpga.adders import AdderGraph
from cost_models.fpga.sharing import share, signed_digits


def terms_of(graph: AdderGraph, inputs: np.ndarray) -> np.ndarray:
    """(samples, terms), the sign of every adder read off its bounds' coefficients."""
    values = list(inputs.T)
    for sign, first, second, shift in zip(
        graph.sign, graph.first, graph.second, graph.shift, strict=True
    ):
        values.append(values[first] + sign * (values[second] << shift))
    return np.stack(values, axis=1)


@pytest.mark.parametrize("seed", range(12))
def test_the_graph_is_the_matrix(seed):
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(2, 9))
    weights = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (int(rng.integers(1, 14)), 9))
    weights[rng.random(weights.shape) < rng.choice([0.0, 0.5, 0.9])] = 0
    graph = AdderGraph.of(weights)
    low, high = (0, 15) if seed % 2 else (-8, 7)
    inputs = rng.integers(low, high + 1, (200, 9))
    terms = terms_of(graph, inputs)
    found = np.where(
        graph.outputs >= 0,
        (terms[:, graph.outputs] << graph.output_shift) * graph.output_sign,
        0,
    )
    assert np.array_equal(found, inputs @ weights.T)
    widths, signed = graph.widths(low, high), graph.plus * low - graph.minus * high < 0
    magnitude = 2 ** (widths - signed)
    assert (terms < magnitude).all()
    assert (terms >= np.where(signed, -magnitude, 0)).all()


def test_a_sum_that_two_outputs_need_is_added_once():
    graph = AdderGraph.of(np.array([[1, 1, 0], [1, 1, 1], [2, 2, 0], [-1, -1, 0]]))
    assert len(graph.first) == 2
    assert list(graph.output_shift) == [0, 0, 1, 0]
    assert graph.outputs[0] == graph.outputs[2] == graph.outputs[3]


def test_digits_are_canonical():
    digits = signed_digits(np.arange(-200, 201))
    values = (digits.astype(np.int64) << np.arange(digits.shape[-1])).sum(axis=-1)
    assert np.array_equal(values, np.arange(-200, 201))
    assert not (digits[:, 1:] * digits[:, :-1]).any()


def test_a_matrix_of_zeros_has_no_adders():
    found, table = share(signed_digits(np.zeros((3, 4), np.int64)))
    assert found == []
    assert not table.any()
    graph = AdderGraph.of(np.zeros((3, 4), np.int64))
    assert list(graph.outputs) == [-1, -1, -1]
    assert graph.register_bits(0, 15, leaves=True) == 0
    one = AdderGraph.of(np.array([[0, 1, 0, 0]]))
    assert list(one.input_registers(leaves=True)) == [0, 1, 0, 0]
    assert one.register_bits(0, 15, leaves=True) == 4  # the output


def test_bits_below_both_operands_and_carries_take_no_table():
    graph = AdderGraph.of(np.array([[1, 4]]))  # a + 4 b, both of 4 bits: 6 bits and a carry
    computed, passed = graph.adder_bits(0, 15)
    assert (list(computed), list(passed)) == ([2], [3])
    computed, passed = graph.adder_bits(-8, 7)  # the sign of a goes on
    assert (list(computed), list(passed)) == ([5], [0])
