"""`--dual`: from the option to packed files, and what the search makes of pairs."""

import json

import numpy as np
import pytest

from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from search.config import RunConfig
from search.finish import measure_packed
from search.prepare import prepare
from search.reallocation import as_searched, reallocated
from search.recovery import Recovery, RecoverySettings
from search.strategies.distortion import DistortionTable, genome_of, groups_of
from search.strategies.surrogate import GeneTable
from search.verify import first_difference

LAYER = "3.conv2"


@pytest.fixture(scope="module")
def task(tiny_tasks):
    return tiny_tasks.cnn()


@pytest.fixture(scope="module")
def ready(task):
    return prepare(task, RunConfig(dual=(LAYER,), bits=(2, 4), recover="fast", threads=1))


def with_residual(ready, width):
    return ready.space.uniform(2).replace({f"{LAYER}.residual": width})


def test_a_run_gives_a_front_and_a_sum_of_two_tensors_verifies(search_call, tiny, tmp_path):
    folder = tmp_path / "run"
    answer = search_call(
        "run", "--task", tiny("cnn"), "--dual", "auto", "--bits", "2,4", "--trials", 12,
        "--pin", "3.conv2.residual=2", "--pin", "3.conv2=2", "--out", folder, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.stderr
    front = json.loads((folder / "front.json").read_text())
    assert front["points"]
    row = min(front["points"], key=lambda row: row["loss"])
    assert row["candidate"]["layers"]["3.conv2.residual"] == "2"
    packed = folder / row["packed"]
    assert packed.stat().st_size == row["size_bytes"]
    checked = search_call("verify", packed, "--run", folder, "--json")
    assert checked.code == 0, checked.stderr
    assert "codes, scales and biases" in json.loads(checked.stdout)["codes"]


def test_what_the_packed_file_does_is_what_was_evaluated(task):
    for activation_bits in ((), (8,)):
        config = RunConfig(dual=("*",), activation_bits=activation_bits, threads=1)
        ready = prepare(task, config)
        mains = [c.name for c in ready.space.layers if not c.residual_of]
        candidate = ready.space.uniform(3).replace({f"{n}.residual": 2 for n in mains[::2]})
        (evaluation,) = ready.evaluator.evaluate_many([candidate])
        packed = PackedModel.from_model(ready.evaluator.bank.quantize(candidate))
        assert packed.size_bytes == evaluation.size_bytes
        measured = measure_packed(ready, packed, "search")
        tolerance = 0.05 if activation_bits else 1e-4
        assert measured.loss == pytest.approx(evaluation.loss, rel=tolerance)


@pytest.mark.parametrize(
    ("dual", "options", "message"),
    [
        (("nothing*",), {}, "--dual nothing* names no layer"),
        (("9",), {"target": "int8"}, "layer '9' cannot be a sum of two tensors"),
    ],
)
def test_what_cannot_be_is_refused(task, dual, options, message):
    with pytest.raises(UsageError) as refusal:
        prepare(task, RunConfig(dual=dual, threads=1, **options))
    assert message in str(refusal.value)


def test_auto_takes_the_worst_few_of_the_layers(task):
    ready = prepare(task, RunConfig(dual=("auto",), threads=1))
    assert {c.residual_of for c in ready.space.layers} == {None, "3.conv1", "3.conv2"}


def test_the_residual_may_be_absent_whatever_the_bits(ready):
    choice = next(c for c in ready.space.layers if c.residual_of)
    assert (choice.name, choice.bit_widths) == (f"{LAYER}.residual", (0, 2, 4))
    assert ready.space.uniform(4).assignment[choice.name].uniform == 0


def test_a_pin_of_a_layer_does_not_reach_its_residual(task):
    config = RunConfig(dual=(LAYER,), pins={"3.*": 8, "*conv2.residual": 2}, threads=1)
    ready = prepare(task, config)
    widths = {c.name: c.bit_widths for c in ready.space.layers}
    assert (widths[LAYER], widths[f"{LAYER}.residual"]) == ((8,), (2,))


def made_up_table(space):
    """Losses and sizes by formula: 4^-(sum of widths), and bytes in proportion to the sum."""
    groups = groups_of(space)
    sums = [
        np.array([sum(w[at] for w, at in zip(g.widths, c, strict=True)) for c in g.choices])
        for g in groups
    ]
    base = tuple(len(g.choices) - 1 for g in groups)
    sizes = tuple(100 * (s - s[-1]) for s in sums)
    return DistortionTable(
        space, groups, tuple(4.0**-s for s in sums), {"size_bytes": sizes}, base,
        {"size_bytes": 9000.0},
    )  # fmt: skip


def test_a_pair_is_one_group_of_widths_that_belong_together(ready):
    groups = {g.names[0]: g for g in groups_of(ready.space)}
    assert len(groups) == len(ready.space.layers) - 1
    pair = groups[LAYER]
    changes = [pair.change(at) for at in range(len(pair.choices))]
    residual = f"{LAYER}.residual"
    wanted = [{LAYER: 2, residual: 2}, {LAYER: 4, residual: 2}, {LAYER: 4, residual: 4}]
    assert [c for c in changes if residual in c] == wanted
    for group, at in ((g, at) for g in groups.values() for at in range(len(g.choices))):
        choice = [len(g.choices) - 1 if g.names != group.names else at for g in groups.values()]
        candidate = ready.space.decode(genome_of(list(groups.values()), choice))
        named = {n: q.uniform for n, q in candidate.layers}
        assert {n: named[n] for n in group.change(at)} == group.change(at)


def test_the_table_by_genes_agrees_with_the_table_by_groups(ready):
    table = made_up_table(ready.space)
    genes = GeneTable.of(table)
    generator = np.random.default_rng(0)
    for _ in range(20):
        choice = [int(generator.integers(len(g.choices))) for g in table.groups]
        genome = genome_of(table.groups, choice)
        assert genes.loss_by_group(genome).sum() == pytest.approx(table.loss(choice))
        assert genes.size(genome) == pytest.approx(table.cost("size_bytes", choice))


def test_a_prediction_from_gradients_knows_pairs(ready):
    changes = [Candidate.of(c) for c in ({LAYER: 2}, {LAYER: 2, f"{LAYER}.residual": 2})]
    single, both = ready.evaluator.predict_many(changes, "linearized")
    exact = [ready.evaluator.measure(change, "probe").loss for change in changes]
    assert both < 0.5 * single
    assert [single, both] == pytest.approx(exact, rel=0.5)


def test_recovery_learns_both_tensors_and_keeps_the_size(ready):
    recovery = Recovery(ready, settings=RecoverySettings(steps=100, most_steps=100, epochs=0.5))
    candidate = with_residual(ready, 4)
    recovered = recovery.recover(candidate, "full")
    assert recovered.loss < 0.95 * recovered.steps[0].loss
    learned, start = recovered.model.layers, ready.evaluator.bank.quantize(candidate).layers
    residual = f"{LAYER}.residual"  # a step of the first tensor is too coarse to be taken often
    assert not np.array_equal(learned[residual].codes, start[residual].codes)
    assert not np.array_equal(learned[LAYER].bias.codes, start[LAYER].bias.codes)
    packed = PackedModel.from_model(recovered.model)
    assert packed.size_bytes == ready.costs["size_bytes"].cost(ready.traced.graph, candidate)


@pytest.mark.parametrize("width", [0, 2])
def test_a_packed_model_is_read_back_under_the_names_of_the_network(ready, width):
    candidate = with_residual(ready, width)
    model = ready.evaluator.bank.quantize(candidate)
    again = as_searched(PackedModel.from_model(model).model, ready, candidate)
    assert again.layers.keys() == model.layers.keys()
    assert first_difference(again, model) is None


def test_widths_of_a_pair_move_together_with_its_codes(ready):
    candidate = with_residual(ready, 2)
    model = ready.evaluator.bank.quantize(candidate)
    graph, size_of = ready.traced.graph, ready.costs["size_bytes"].cost
    limit = int(size_of(graph, candidate)) + 200
    found = reallocated(ready, model, limit)
    assert found is not None
    assert ready.space.contains(found)
    assert size_of(graph, found) <= limit
