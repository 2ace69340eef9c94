"""Evaluations are the same wherever they run, and a lost worker loses none."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from quant_ops.errors import EnvironmentFault
from search.config import RunConfig
from search.early_stop import Incumbent
from search.prepare import prepare
from search.record import JOURNAL, Record
from search.runners.base import Job
from search.runners.in_process import InProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(tiny_tasks):
    return prepare(tiny_tasks.mlp(), RunConfig(threads=1))


@pytest.fixture(scope="module")
def jobs(prepared):
    widths = (8, 7, 6, 5, 4, 3, 2, 1.6, 1)
    full = [Job(prepared.space.uniform(b)) for b in widths]
    return full + [Job(job.candidate, "probe") for job in full]


@pytest.fixture(scope="module")
def wanted(prepared, jobs):
    return [comparable(result) for _, result in InProcess(prepared.evaluator).run(jobs)]


def comparable(result):
    if isinstance(result, float):
        return result
    return result.candidate, result.loss, result.metric, result.agreement, dict(result.costs)


class Faulty:
    """An evaluator that dies or hangs the first time it meets a candidate."""

    def __init__(self, make_evaluator, candidate, fault, marker):
        self._evaluator = make_evaluator()
        self._candidate, self._fault, self._marker = candidate, fault, Path(marker)

    def judge(self, split):
        return self._evaluator.judge(split)

    def measure_many(self, candidates, split):
        return self._evaluator.measure_many(candidates, split)

    def evaluate_many(self, candidates, incumbents):
        met = self._candidate in candidates
        if met and (self._fault == "always" or not self._marker.exists()):
            self._marker.touch()
            if self._fault == "hang":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return self._evaluator.evaluate_many(candidates, incumbents)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    from search.runners import cluster

    cluster.start(None, 2)
    yield ray
    ray.shutdown()


@pytest.fixture
def cluster(ray, prepared):
    """Makes a cluster of two workers, by default of sound ones."""
    from search.runners.cluster import Cluster

    clusters = []

    def make(make_evaluator=prepared.spec, **settings):
        import cloudpickle

        cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
        clusters.append(Cluster(make_evaluator, n_workers=2, **settings))
        return clusters[-1]

    yield make
    for each in clusters:
        each.close()


def test_ray_workers_stop_the_same_candidates_at_the_same_bounds(cluster, tiny_tasks):
    ready = prepare(tiny_tasks.cnn(), RunConfig(threads=1))
    here = InProcess(ready.evaluator)
    plain = [Job(ready.space.uniform(b)) for b in (8, 4, 3, 2, 1.6, 1)]
    (_, best), *_ = here.run(plain)
    incumbent = Incumbent(best.loss, best.sample_losses)
    jobs = [replace(job, incumbent=incumbent) for job in plain]
    wanted = [(e.loss, e.pruned, dict(e.notes)) for _, e in here.run(jobs)]
    assert {pruned for _, pruned, _ in wanted} == {True, False}
    found = dict(cluster(ready.spec).run(jobs))
    assert [(found[i].loss, found[i].pruned, dict(found[i].notes)) for i in range(6)] == wanted


def results_in_order(runner, jobs):
    found = dict(runner.run(jobs))
    assert sorted(found) == list(range(len(jobs)))
    return [comparable(found[i]) for i in range(len(jobs))]


def test_ray_workers_answer_what_this_process_answers(cluster, jobs, wanted):
    runner = cluster()
    assert results_in_order(runner, jobs) == wanted
    assert results_in_order(runner, jobs[:1]) == wanted[:1]
    assert results_in_order(runner, []) == []


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_lost_worker_is_replaced_and_loses_nothing(
    cluster, prepared, jobs, wanted, tmp_path, fault
):
    made = partial(Faulty, prepared.spec, jobs[3].candidate, fault, str(tmp_path / "met"))
    runner = cluster(made, timeout_s=3.0)
    assert results_in_order(runner, jobs) == wanted
    assert (tmp_path / "met").exists()


def test_a_candidate_that_kills_every_worker_ends_the_run(cluster, prepared, jobs, tmp_path):
    made = partial(Faulty, prepared.spec, jobs[0].candidate, "always", str(tmp_path / "met"))
    with pytest.raises(EnvironmentFault, match="died or hung on the same candidates"):
        results_in_order(cluster(made), jobs[:1])


def descendants(pid):
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def actors(pid):
    """Process ids of the workers that a run has started."""
    found = []
    for child in descendants(pid):
        try:
            title = (Path("/proc") / str(child) / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::_Worker" in title:
            found.append(child)
    return found


def without_times(folder):
    found = Record.open(folder).evaluations()
    return [(e.trial, e.candidate, e.loss, e.metric, e.strategy) for e in found]


def test_a_worker_killed_during_a_run_changes_nothing(search_process, search_call, tiny, tmp_path):
    arguments = ("run", "--task", tiny("zoo"), "--trials", 60, "--budget", "4kB", "--threads", 1)
    assert search_call(*arguments, "--out", tmp_path / "alone").code == 0
    process = search_process(*arguments, "--workers", 2, "--out", tmp_path / "ray")
    journal = tmp_path / "ray" / JOURNAL
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"datetime_complete") >= 10
    ):
        time.sleep(0.02)
    killed = actors(process.pid)[0]
    os.kill(killed, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert "was lost" in stderr
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "alone")
