import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_ops.candidate import Candidate
from quant_ops.errors import EnvironmentFault, NothingFeasibleError, VerificationError
from search.budget import Budgets
from search.dominance import HypervolumeScale, non_dominated
from search.evaluation import Evaluation
from search.front import FrontInfo, ParetoFront

SCALE = HypervolumeScale(2**10, 2**14, worst_loss=2.0)


def evaluation(loss, size, *, trial=0, strategy="random", metric=0.9, **more):
    candidate = Candidate.of({"conv": 4, "fc": 8})
    costs = {"size_bytes": size, **more.pop("costs", {})}
    return Evaluation(
        candidate, loss, metric, costs, strategy=strategy, trial=trial, loss_stderr=0.01, **more
    )


def info(*budgets, **more):
    fields = {
        "task": "toy", "metric": "top-1", "higher_is_better": True, "percent": True,
        "n_validation": 1000, "float_validation": 0.92, "float_size_bytes": 2**16,
        "scale": SCALE, "budgets": Budgets.parse(budgets),
    }  # fmt: skip
    return FrontInfo(**{**fields, **more})


def front_of(pairs, *budgets, **more):
    evaluations = [evaluation(loss, size, trial=i) for i, (loss, size) in enumerate(pairs)]
    return ParetoFront.of(evaluations, info(*budgets, **more))


def test_a_front_holds_what_nothing_matches_or_beats():
    front = front_of([(3, 100), (2, 200), (2, 300), (2.5, 200), (1, 400), (5, 400), (1.5, 300)])
    assert [e.trial for e in front.points] == [0, 1, 6, 4]
    assert [e.size_bytes for e in front.points] == [100, 200, 300, 400]


def test_of_equals_the_first_is_kept():
    assert [e.trial for e in front_of([(1, 100), (1, 100), (1, 100)]).points] == [0]


def test_pruned_and_non_finite_evaluations_never_enter():
    candidates = [
        evaluation(0.1, 10, pruned=True), evaluation(math.inf, 5), evaluation(math.nan, 5),
        evaluation(1.0, 100, trial=3),
    ]  # fmt: skip
    assert [e.trial for e in non_dominated(candidates)] == [3]
    assert non_dominated(candidates[:3]) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=40))
def test_a_front_equals_the_definition(pairs):
    front = {(e.loss, e.size_bytes) for e in front_of(pairs).points}
    assert front == {
        p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs)
    }


@pytest.mark.parametrize(("budget", "trials"), [("299", [0, 1]), ("300", [0, 1, 2])])
def test_a_budget_is_inclusive(budget, trials):
    front = front_of([(3, 100), (2, 200), (1, 300)], budget)
    assert [e.trial for e in front.points] == trials


def test_every_budget_counts():
    evaluations = [
        evaluation(1.0, 100, costs={"bops": 2e9}),
        evaluation(2.0, 100, costs={"bops": 1e9}, trial=1),
    ]  # fmt: skip
    front = ParetoFront.of(evaluations, info("1kB", "bops=1G"))
    assert [e.trial for e in front.points] == [1]


@pytest.mark.parametrize(
    ("size", "trial"), [(100, 0), (199, 0), (200, 1), ("0.2kB", 1), ("1MB", 2), (None, 2)]
)
def test_best_is_the_lowest_loss_at_or_under_a_size(size, trial):
    assert front_of([(3, 100), (2, 200), (1, 300)]).best(size).trial == trial


def test_nothing_small_enough_is_said_with_the_reach_of_the_front():
    with pytest.raises(NothingFeasibleError, match=r"at or under 99 B.*from 100 B to 2.00 kB"):
        front_of([(3, 100), (2, 2000)]).best(99)
    with pytest.raises(NothingFeasibleError, match=r"none of 1 evaluations.*size_bytes <= 50"):
        front_of([(3, 100)], "50").best()


def test_within_drop_is_the_smallest_model_that_is_good_enough():
    losses = [(3, 100, 0.80), (2, 200, 0.915), (1, 300, 0.92)]
    front = ParetoFront.of(
        [evaluation(loss, s, metric=m, trial=i) for i, (loss, s, m) in enumerate(losses)], info()
    )
    assert front.within_drop(0.5).trial == 1
    assert front.within_drop(0.4).trial == 2
    assert front.within_drop(12).trial == 0
    with pytest.raises(NothingFeasibleError, match=r"the best loses 0\.00"):
        front.within_drop(-0.1)


def test_a_metric_where_lower_is_better_drops_upwards():
    evaluations = [evaluation(2, 100, metric=1.5), evaluation(1, 200, metric=1.1, trial=1)]
    front = ParetoFront.of(
        evaluations, info(higher_is_better=False, percent=False, float_validation=1.0)
    )
    assert front.drop(front.points[0]) == pytest.approx(0.5)
    assert front.within_drop(0.2).trial == 1


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_staircase_has_closed_form_hypervolume(n):
    # Corners at ((i + 1/2) / n) along both axes: columns of 1 / n width and heights i / n + ...
    scale = HypervolumeScale(1, 2**n, worst_loss=float(n))
    front = [evaluation(n - 1 - i, 2**i) for i in range(n)]
    assert scale.hypervolume(front) == pytest.approx(n * (n + 1) / 2 / n**2)


def test_points_outside_the_square_are_clipped():
    corner = evaluation(0.0, 2**10)
    assert SCALE.hypervolume([corner]) == pytest.approx(1.0)
    assert SCALE.hypervolume([evaluation(-1.0, 2**9)]) == pytest.approx(1.0)
    assert SCALE.hypervolume([evaluation(2.0, 2**10), evaluation(0.0, 2**14)]) == 0.0
    assert SCALE.hypervolume([]) == 0.0
    assert SCALE.hypervolume([evaluation(0.0, 2**10, pruned=True)]) == 0.0


def test_share_of_gap_is_between_the_baseline_and_the_union():
    baseline, better = [evaluation(1.5, 2**12)], [evaluation(1.0, 2**12)]
    best = [evaluation(0.5, 2**12)]
    union = [*baseline, *better, *best]
    assert SCALE.share_of_gap(better, baseline=baseline, union=union) == pytest.approx(0.5)
    assert SCALE.share_of_gap(baseline, baseline=baseline, union=union) == 0.0
    assert SCALE.share_of_gap(best, baseline=baseline, union=union) == pytest.approx(1.0)
    assert SCALE.share_of_gap(best, baseline=best, union=best) is None


def test_each_baseline_has_a_front_of_its_own_even_outside_the_budget():
    evaluations = [
        evaluation(3, 100, strategy="uniform"), evaluation(1, 900, strategy="uniform", trial=1),
        evaluation(2, 100, strategy="rate-distortion", trial=2), evaluation(1, 100, trial=3),
    ]  # fmt: skip
    front = ParetoFront.of(evaluations, info("500"))
    assert [e.trial for e in front.baselines] == [0, 1, 2]
    assert [e.trial for e in front.points] == [3]


def test_mean_weight_bits_come_from_the_space_or_from_the_notes():
    evaluations = [evaluation(1, 100, notes={"mean_weight_bits": 3.0})]
    assert ParetoFront.of(evaluations, info()).mean_weight_bits == {0: 3.0}
    weights = {"conv": (3, 10), "fc": (1, 10)}
    front = ParetoFront.of(evaluations, info(), weights_per_channel=weights)
    assert front.mean_weight_bits == {0: 5.0}


def test_front_json_has_the_documented_keys_and_reads_back_equal(tmp_path):
    evaluations = [
        evaluation(2, 2000, strategy="uniform", agreement=0.5),
        evaluation(1, 3000, trial=7, recipe="adaround", parent=0, weights_digest="ab",
                   costs={"bops": 1.5e9}, notes={"mean_weight_bits": 3.5}),
    ]  # fmt: skip
    front = ParetoFront.of(evaluations, info("4kB", "3kB"), seconds=12.5)
    front = front.with_packed({7: "packed/7.safetensors"}).with_test({7: 0.91}, float_test=0.93)
    front.save(tmp_path / "front.json")
    value = json.loads((tmp_path / "front.json").read_text())
    assert value["format"] == "bitfront-front"
    assert value["version"] == 1
    assert value["float"] == {"validation": 0.92, "test": 0.93, "size_bytes": 2**16}
    assert value["budgets"] == {"size_bytes": 4000.0}
    assert value["requested"] == {"size_bytes": [3000.0, 4000.0]}
    assert value["hypervolume"]["reference_point"] == [1.0, 1.0]
    assert value["hypervolume"]["scale"] == {"size_bytes": [2**10, 2**14], "loss": [0.0, 2.0]}
    point = value["points"][1]
    assert (point["trial"], point["validation"], point["test"]) == (7, 0.9, 0.91)
    assert point["packed"] == "packed/7.safetensors"
    assert value["points"][0]["test"] is None
    assert ParetoFront.load(tmp_path / "front.json") == front
    assert [p.name for p in tmp_path.iterdir()] == ["front.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "bitfront-front", "version": 1}'])
def test_a_damaged_front_is_refused(tmp_path, content):
    (tmp_path / "front.json").write_text(content)
    with pytest.raises(VerificationError):
        ParetoFront.load(tmp_path / "front.json")


def test_an_old_front_stays_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "front.json"
    path.mkdir()
    with pytest.raises(EnvironmentFault, match=r"cannot write .*front\.json"):
        front_of([(1, 100)]).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["front.json"]


@pytest.mark.parametrize("arguments", [(0, 10, 1.0), (10, 10, 1.0), (1, 2, 0.0), (1, 2, math.inf)])
def test_a_scale_without_extent_is_refused(arguments):
    with pytest.raises(ValueError, match=r"no size range|worst_loss"):
        HypervolumeScale(*arguments)


def test_trained_points_are_a_front_of_their_own_where_validation_was_trained_on(make_front):
    _, front = make_front()
    plain = [replace(e, trial=i) for i, e in enumerate(front.points)]
    small = replace(plain[0], recipe="finetune", parent=0, trial=90, loss=plain[-1].loss / 2)
    middle = replace(plain[3], recipe="finetune", parent=3, trial=91, loss=plain[-1].loss / 3)
    worse = replace(plain[2], recipe="finetune", parent=2, trial=92, loss=plain[0].loss)
    everything = [*plain, small, middle, worse]
    together = ParetoFront.of(everything, replace(front.info, trained_apart=False))
    assert [e.trial for e in together.points] == [90, 91]
    apart = ParetoFront.of(everything, replace(front.info, trained_apart=True))
    assert [e.trial for e in apart.parts()["front"]] == [e.trial for e in plain]
    assert [e.trial for e in apart.parts()["front, trained"]] == [90, 91]
    assert apart.best(middle.size_bytes).trial == 91
    assert apart.best(middle.size_bytes - 1).trial == 2  # larger than the small trained one
    assert apart.best().trial == plain[-1].trial
    assert ParetoFront.from_json(apart.to_json()).best(middle.size_bytes).trial == 91
