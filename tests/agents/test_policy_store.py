"""A trained pair on disk: read back exactly, refused where it does not fit."""

import json
import re

import numpy as np
import pytest

from agents.controllers import ALGORITHMS, seeded
from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS
from agents.pilot import Pilot, Scope
from agents.policy_store import DESCRIPTION, check_policy, load_policy, save_policy
from quant_ops.errors import UsageError
from search.strategies.table import make_strategy
from search.testing import AdditiveTask, FakeContext, run_to_end

ROWS = np.random.default_rng(0).random((5, len(LAYER_FIELDS)), np.float32)
PARTS = np.random.default_rng(1).random((5, len(CHANNEL_FIELDS)), np.float32)


@pytest.fixture
def saved(tmp_path):
    with seeded(0):
        pilot = Pilot(Scope(), "ddpg", 16)
    save_policy(pilot, tmp_path / "policy", "ajpq")
    return pilot, tmp_path / "policy"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_that_is_read_back_acts_the_same(algorithm, tmp_path):
    with seeded(0):
        pilot = Pilot(Scope(), algorithm, 16)
    save_policy(pilot, tmp_path, "ajpq")
    with seeded(1):
        again = load_policy(tmp_path, Scope(), "ajpq")
    assert np.array_equal(pilot.layers.act(ROWS), again.layers.act(ROWS))
    assert np.array_equal(pilot.channels.act(PARTS), again.channels.act(PARTS))


def test_no_file_of_a_policy_is_a_pickle(saved):
    _, folder = saved
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["channel.safetensors", "layer.safetensors", DESCRIPTION]


def test_a_policy_of_another_layout_is_refused_in_one_sentence(saved):
    _, folder = saved
    content = json.loads((folder / DESCRIPTION).read_text())
    content["layout"]["layer observation"].remove("budget")
    (folder / DESCRIPTION).write_text(json.dumps(content))
    message = (
        "has another layout: its layer observation has 20 fields, this strategy's has 21 "
        "(it lacks budget)"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        check_policy(folder, Scope(), "ajpq")


def test_a_policy_of_another_strategy_is_refused(saved):
    _, folder = saved
    with pytest.raises(UsageError, match="has another layout: its channel action"):
        load_policy(folder, Scope(prune=False, by_channel=False), "haq")


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no policy of 'ajpq'.*give the folder of a run"):
        check_policy(tmp_path, Scope(), "ajpq")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable JSON"), ("[]", "not a policy"), ('{"format": "x"}', "not a policy")],
)
def test_a_damaged_description_is_refused(saved, text, message):
    _, folder = saved
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(UsageError, match=message):
        check_policy(folder, Scope(), "ajpq")


@pytest.mark.parametrize("damage", [b"", b"not tensors"])
def test_damaged_tensors_are_refused(saved, damage):
    _, folder = saved
    (folder / "channel.safetensors").write_bytes(damage)
    with pytest.raises(UsageError, match="does not hold the channel controller"):
        load_policy(folder, Scope(), "ajpq")


def test_a_run_leaves_its_controllers_and_another_network_takes_them_up():
    small = {"hidden": 16, "steps": 2, "proposals": 2, "members": 2}
    widths = (0.0, 2.0, 4.0, 8.0)
    first = FakeContext(AdditiveTask.make(n_layers=3, n_groups=4, widths=widths), trials=20)
    run_to_end(make_strategy("ajpq", small), first)
    folder = first.folder("agents") / "ajpq-policy"
    other = FakeContext(AdditiveTask.make(n_layers=5, n_groups=8, widths=widths, seed=1))
    again = make_strategy("ajpq", {**small, "policy": str(folder)})
    again.check(other.space)
    assert len(run_to_end(again, other)) == other.trials
