"""A candidate is given up only when a known one of at most its cost is sure to be better."""

import math
from contextlib import suppress
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm

from quant_ops.candidate import Candidate
from search.budget import Budgets
from search.config import RunConfig
from search.context import Limits, Listener, RunContext
from search.early_stop import BOLDEST, FIRST_LOOK, MARGIN, Incumbent, Incumbents, evidence
from search.engine import front_info
from search.evaluation import Evaluation, share_saved
from search.front import ParetoFront
from search.prepare import prepare
from search.record import JOURNAL, Record
from search.runners.in_process import InProcess
from search.strategies.table import make_strategy
from search.strategy import SearchOver
from search.tables import print_front

N_SAMPLES = 512
N_PATHS = 600
LOSSES = {
    "alike": lambda rng: (rng.standard_exponential(N_SAMPLES), rng.standard_exponential(N_SAMPLES)),
    "incumbent heavy": lambda rng: (
        rng.standard_exponential(N_SAMPLES) ** 3, rng.random(N_SAMPLES),
    ),
    "candidate heavy": lambda rng: (
        rng.random(N_SAMPLES), np.exp(2 * rng.standard_normal(N_SAMPLES)),
    ),
    "candidate mostly 0": lambda rng: (
        rng.random(N_SAMPLES), rng.standard_exponential(N_SAMPLES) * (rng.random(N_SAMPLES) < 0.05),
    ),
    "right or wrong": lambda rng: (
        (rng.random(N_SAMPLES) < 0.1) * 1.0, (rng.random(N_SAMPLES) < 0.1) * 1.0,
    ),
}  # fmt: skip


def crossings(make, error):
    """How often the true mean is ever taken for too low, over random splits."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(N_PATHS):
        known, losses = make(rng)
        found += evidence(losses[:-1], known, losses.mean()).max() >= -math.log(error)
    return found / N_PATHS


@pytest.mark.parametrize("error", [0.02, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_the_true_mean_is_taken_for_too_low_no_more_often_than_said_at_any_time(name, error):
    assert crossings(LOSSES[name], error) <= error + 2 * math.sqrt(error / N_PATHS)


def test_repeated_tests_would_err_more_often():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((N_PATHS, N_SAMPLES)).cumsum(axis=1)
    z /= np.sqrt(np.arange(1, N_SAMPLES + 1))
    assert (z[:, FIRST_LOOK - 1 :] > norm.ppf(0.9)).any(axis=1).mean() > 0.2


def test_a_bet_on_constant_losses_has_a_closed_form():
    known, level = np.zeros(10), 0.5
    log_wealth = evidence(np.full(3, 2.0), known, level)
    # unpaired, as the incumbent loses nothing: rest is (10 * level - total) / left
    assert log_wealth[0] == 0  # nothing is known yet: no bet
    rest = (10 * level - 2.0) / 9
    mean, square = (level + 2.0) / 2, (2 * level**2 + 4.0) / 2
    bet = (mean - rest) / (square - mean**2 + (mean - rest) ** 2)
    assert bet < BOLDEST / rest
    assert log_wealth[1] == pytest.approx(math.log1p(bet * (2.0 - rest)))


def test_losses_that_already_sum_to_more_than_the_level_allows_are_proof():
    assert evidence(np.full(3, 2.0), np.zeros(10), 0.5)[2] < math.inf
    assert evidence(np.full(4, 2.0), np.zeros(10), 0.5)[3] == math.inf


def incumbent(rng, loss=0.1):
    losses = (loss * rng.standard_exponential(N_SAMPLES)).astype(np.float32)
    return Incumbent(float(losses.mean(dtype=float)), losses)


def test_a_hopeless_candidate_is_given_up_at_the_first_look_and_not_before():
    known = incumbent(np.random.default_rng(0))
    losses = 4.0 * known.losses.astype(float)
    assert known.verdict(losses[: FIRST_LOOK - 1]) is None
    stop = known.verdict(losses[:FIRST_LOOK])
    assert stop.n_samples == FIRST_LOOK
    assert known.loss * (1 + MARGIN) < stop.bound < losses.mean()
    assert stop.estimate == pytest.approx(losses.mean(), rel=0.3)


def test_at_the_end_there_is_nothing_left_to_give_up():
    known = incumbent(np.random.default_rng(0))
    assert known.verdict(3.0 * known.losses.astype(float)) is None


@pytest.mark.parametrize(("factor", "stopped"), [(0.5, False), (1.0, False), (1.04, False),
                                                 (1.5, True)])  # fmt: skip
def test_near_ties_go_on_however_sure_they_are(factor, stopped):
    known = Incumbent(0.1, np.full(N_SAMPLES, 0.1, np.float32))
    assert (known.verdict(np.full(384, 0.1 * factor)) is not None) == stopped


def test_where_losses_can_be_negative_nothing_is_given_up():
    known = Incumbent(0.1, np.full(N_SAMPLES, 0.1, np.float32))
    losses = np.full(384, 9.0)
    losses[0] = -0.5
    assert known.verdict(losses) is None
    assert Incumbent(0.1, -known.losses).verdict(np.full(384, 9.0)) is None


def test_outputs_that_are_not_finite_are_hopeless():
    known = incumbent(np.random.default_rng(0))
    losses = known.losses[:256].astype(float)
    losses[3] = math.inf
    assert known.verdict(losses).bound == math.inf


def known_evaluation(trial, loss, size, bops=1.0):
    costs = {"size_bytes": float(size), "bops": bops}
    return Evaluation(Candidate.of({"a": 4}), loss, None, costs, trial=trial)


def test_the_incumbent_is_the_best_known_that_costs_no_more_in_any_respect():
    known = Incumbents(("size_bytes", "bops"))
    for each in (
        known_evaluation(0, 0.3, 10, 5.0), known_evaluation(1, 0.2, 20, 5.0),
        known_evaluation(2, 0.1, 20, 9.0), replace(known_evaluation(3, 0.01, 10), pruned=True),
        replace(known_evaluation(4, 0.01, 10), recipe="full"), known_evaluation(5, math.inf, 1),
    ):  # fmt: skip
        known.add(each)
    assert known.best({"size_bytes": 9.0, "bops": 99.0}) is None
    assert known.best({"size_bytes": 19.0, "bops": 99.0}).trial == 0
    assert known.best({"size_bytes": 20.0, "bops": 8.0}).trial == 1
    assert known.best({"size_bytes": 20.0, "bops": 9.0}).trial == 2


def test_losses_of_beaten_candidates_are_forgotten_and_memory_is_bounded():
    known = Incumbents(("size_bytes",), memory_bytes=8 * N_SAMPLES)
    losses = np.zeros(N_SAMPLES, np.float32)
    evaluations = [known_evaluation(i, 1.0 / (i + 1), 10 * (i + 1)) for i in range(4)]
    for each in evaluations:
        known.add(each, losses)
    assert [known.losses(e) is None for e in evaluations] == [True, True, False, False]
    known.add(known_evaluation(9, 0.0, 1), losses)
    assert all(known.losses(e) is None for e in evaluations)


@pytest.fixture(scope="module")
def prepared(tiny_tasks):
    return prepare(tiny_tasks.cnn(), RunConfig(threads=1))


def test_a_stopped_network_leaves_and_the_others_go_on_as_if_alone(prepared):
    evaluator, space = prepared.evaluator, prepared.space
    candidates = [space.uniform(b) for b in (2, 8, 1, 4, 3)]
    alone = evaluator.evaluate_many(candidates)
    best = alone[1]
    rival = Incumbent(best.loss, best.sample_losses)
    together = evaluator.evaluate_many(candidates, [None, rival, rival, None, rival])
    assert [e.pruned for e in together] == [False, False, True, False, True]
    for got, wanted in zip(together, alone, strict=True):
        assert got.costs == wanted.costs
        if got.pruned:
            assert best.loss < got.loss < wanted.loss
            assert (got.metric, got.agreement) == (None, None)
            assert got.notes["samples"] == 256
            assert got.notes["samples left"] == 144
            assert got.estimated_loss == pytest.approx(wanted.loss, rel=0.3)
        else:
            assert (got.loss, got.metric) == (wanted.loss, wanted.metric)
            np.testing.assert_array_equal(got.sample_losses, wanted.sample_losses)


def context_of(prepared, folder, *, early_stop=True, listener=None):
    made = (folder / JOURNAL).exists()
    folder.mkdir(exist_ok=True)
    return RunContext(
        space=prepared.space, budgets={}, costs=prepared.costs, seed=1,
        runner=InProcess(prepared.evaluator), folder=folder, evaluator=prepared.evaluator,
        record=Record.open(folder) if made else Record.create(folder, name="x", metadata={}),
        early_stop=early_stop, listener=listener,
    )  # fmt: skip


def searched(prepared, folder, **settings):
    """As the engine does it: on a folder that holds a record, the run goes on."""
    context = context_of(prepared, folder, **settings)
    for name, trials in (("uniform", 9), ("random", 32)):
        context.begin(name, Limits(trials, None))
        with suppress(SearchOver):
            make_strategy(name).run(context)
    return folder


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """Folders of the same run with and without stopping."""
    folder = tmp_path_factory.mktemp("runs")
    return {on: searched(prepared, folder / str(on), early_stop=on) for on in (True, False)}


@pytest.fixture(scope="module")
def fronts(prepared, runs):
    info = front_info(prepared, Budgets.parse(()))
    return {on: ParetoFront.of(Record.open(runs[on]).evaluations(), info) for on in runs}


def compared(folder):
    return [
        (e.trial, e.candidate, e.loss, e.metric, e.strategy, e.pruned, dict(e.notes))
        for e in Record.open(folder).evaluations()
    ]


def test_fronts_with_and_without_stopping_are_equal(fronts):
    points = [[(p.trial, p.candidate, p.loss, p.metric) for p in fronts[on].points]
              for on in (True, False)]  # fmt: skip
    assert points[0] == points[1]
    assert fronts[True].hypervolume == fronts[False].hypervolume
    assert fronts[True].n_evaluations == fronts[False].n_evaluations
    assert fronts[True].n_stopped > 3
    assert fronts[False].n_stopped == 0


def test_a_stopped_trial_is_a_pruned_one_and_worse_than_what_beat_it(runs):
    stopped = {e.trial: e for e in Record.open(runs[True]).evaluations() if e.pruned}
    whole = {e.trial: e for e in Record.open(runs[False]).evaluations()}
    assert stopped
    for trial, e in stopped.items():
        assert e.candidate == whole[trial].candidate
        assert e.loss <= whole[trial].loss
        assert any(k.size_bytes <= e.size_bytes and k.loss < e.loss
                   for k in whole.values() if k.trial < trial)  # fmt: skip


def test_the_summary_says_how_many_were_stopped_and_what_it_saved(fronts, runs, tmp_path):
    evaluations = Record.open(runs[True]).evaluations()
    n = sum(e.pruned for e in evaluations)
    left = [e.notes["samples left"] for e in evaluations if e.pruned]
    assert set(left) <= {144, 16}
    assert share_saved(evaluations) == pytest.approx(sum(left) / 400 / len(evaluations))
    fronts[True].save(tmp_path / "front.json")
    read = ParetoFront.load(tmp_path / "front.json")
    assert (read.n_stopped, read.saved) == (n, share_saved(evaluations))
    assert f"{n} stopped early" in printed(read)
    assert "stopped early" not in printed(fronts[False])


def printed(front):
    console = Console(width=200, file=StringIO())
    print_front(front, console)
    return console.file.getvalue()


def test_baselines_are_never_stopped(runs):
    assert not any(e.pruned for e in Record.open(runs[True]).evaluations()
                   if e.strategy == "uniform")  # fmt: skip


class Interrupting(Listener):
    """Interrupts a run after so many new evaluations, in the middle of a batch."""

    def __init__(self, after):
        self.left = after

    def on_evaluation(self, evaluation, known):
        self.left -= not known
        if not self.left:
            raise KeyboardInterrupt


def test_a_run_that_was_cut_often_ends_like_an_undisturbed_one(runs, prepared, tmp_path):
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            searched(prepared, tmp_path / "run", listener=Interrupting(11))
    assert compared(searched(prepared, tmp_path / "run")) == compared(runs[True])


def test_a_baseline_is_measured_in_full_though_it_was_stopped_before(prepared, tmp_path):
    context = context_of(prepared, tmp_path)
    context.begin("uniform", Limits(None, None))
    context.evaluate([prepared.space.uniform(3)])
    # wide where it costs bytes and 1 bit where it hurts: larger and worse
    genome = list(prepared.space.encode(prepared.space.largest()))
    genome[0] = genome[-1] = 0
    bad = prepared.space.decode(genome)
    context.begin("random", Limits(None, None))
    (stopped,) = context.evaluate([bad])
    assert stopped.pruned
    context.begin("uniform", Limits(None, None))
    (whole,) = context.evaluate([bad])
    assert not whole.pruned
    again = context_of(prepared, tmp_path)
    again.begin("random", Limits(None, None))
    assert again.evaluate([bad]) == [stopped]
    again.begin("uniform", Limits(None, None))
    assert again.evaluate([bad]) == [whole]
