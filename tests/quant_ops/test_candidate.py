import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.candidate import SCHEMES, Candidate, LayerQuant, unique

layer_quants = st.builds(
    LayerQuant,
    st.lists(st.sampled_from(BIT_WIDTHS), min_size=1, max_size=20).map(tuple),
    st.sampled_from(SCHEMES),
    st.none() | st.integers(1, 64),
)
candidates = st.builds(
    Candidate.of,
    st.dictionaries(st.text("abc.0", min_size=1, max_size=5), layer_quants, max_size=5),
    st.dictionaries(st.text("xyz_", min_size=1, max_size=5), st.integers(2, 8), max_size=5),
)


@given(layer_quants)
def test_text_of_a_layer_comes_back(quant):
    assert LayerQuant.from_text(quant.to_text()) == quant


@given(candidates)
def test_json_of_a_candidate_comes_back_in_order(candidate):
    again = Candidate.from_json(json.loads(json.dumps(candidate.to_json())))
    assert again == candidate
    assert hash(again) == hash(candidate)
    assert again.digest() == candidate.digest()


def test_one_width_for_all_channels_has_one_spelling():
    assert LayerQuant((4, 4, 4)) == LayerQuant((4,))
    assert LayerQuant((4, 4, 2)).uniform is None
    assert LayerQuant((4, 4, 4)).uniform == 4
    assert Candidate.of({"a": 4}) == Candidate.of({"a": LayerQuant((4.0, 4.0))})


def test_widths_are_spread_over_channels():
    assert LayerQuant((4,)).per_channel(3) == (4, 4, 4)
    assert LayerQuant((4, 0, 8)).per_channel(3) == (4, 0, 8)
    with pytest.raises(ValueError, match="3 bit widths for 2 channels"):
        LayerQuant((4, 0, 8)).per_channel(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "at least one"),
        (((9,),), "not legal bit widths"),
        (((2.5,),), "not legal bit widths"),
        (((4,), "stochastic"), "scheme 'stochastic'"),
        (((4,), "auto", 0), "must be positive"),
    ],
)
def test_what_is_no_layer_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerQuant(*arguments)


def test_replacing_keeps_the_order_and_the_activations():
    candidate = Candidate.of({"a": 4, "b": 8}, {"x": 8})
    changed = candidate.replace({"a": LayerQuant((2, 0))})
    assert [name for name, _ in changed.layers] == ["a", "b"]
    assert changed.assignment["a"].bit_widths == (2, 0)
    assert changed.activations == candidate.activations


def test_mean_bits_are_weighted_by_weights():
    candidate = Candidate.of({"a": LayerQuant((4, 0)), "b": 8})
    assert candidate.mean_weight_bits({"a": (2, 10), "b": (1, 20)}) == (10 * 4 + 20 * 8) / 40
    assert Candidate.of({}).mean_weight_bits({}) == 0


def test_digests_are_the_same_in_every_process():
    candidate = Candidate.of({"conv": LayerQuant((4, 0, 1.6)), "fc": 8}, {"relu": 4})
    code = (
        "from quant_ops.candidate import *;"
        "print(Candidate.of({'conv': LayerQuant((4, 0, 1.6)), 'fc': 8}, {'relu': 4}).digest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == candidate.digest()


def test_unique_keeps_the_first():
    a, b = Candidate.of({"x": 2}), Candidate.of({"x": 4})
    assert unique([a, b, a, Candidate.of({"x": 2})]) == [a, b]
