"""Pair terms find the optimum that single losses miss, within a bounded number of probes."""

import json
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from quant_ops.candidate import Candidate
from quant_ops.errors import UsageError
from search.capture import trace
from search.config import RunConfig
from search.context import ProbeLog
from search.engine import run_search
from search.evaluation import Evaluation
from search.prediction import compared
from search.space import LayerChoice, SearchSpace
from search.strategies.distortion import measure_table
from search.strategies.pairs import (
    MOST_PRODUCTS,
    _blocks,
    block_table,
    with_pairs,
    worthwhile,
)
from search.strategies.rate_distortion import Program
from search.strategies.table import make_strategy
from search.testing import FakeContext, run_to_end

WIDTHS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


class Residual(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(depth))

    def forward(self, x):
        y = x
        for layer in self.inner:
            y = torch.relu(layer(y))
        return x + y


@dataclass(frozen=True)
class QuadraticTask:
    """loss = e' H e with e_l = 2^-b_l: errors of layers of one block add up or cancel."""

    space: SearchSpace
    hessian: np.ndarray
    sensitivity: dict = field(default_factory=dict)

    def loss_of(self, widths):
        names = [choice.name for choice in self.space.layers]
        error = np.array([2.0 ** -widths[n] if n in widths else 0.0 for n in names])
        return float(error @ self.hessian @ error)

    def loss(self, candidate):
        return self.loss_of({name: quant.uniform for name, quant in candidate.layers})

    def size_bytes(self, candidate):
        return 100 + sum(int(8 * quant.uniform) for _, quant in candidate.layers)

    def bops(self, candidate):
        return float(self.size_bytes(candidate))


@dataclass
class QuadraticContext(FakeContext):
    def probe(self, changes):
        self.n_probes += len(changes)
        return [self.task.loss_of(change) for change in changes]


def task_of(*depths, coupling=0.9):
    """Blocks of linear layers; neighbours in a block are coupled, half of them negatively."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(depth) for depth in depths)).eval()
    graph = trace(model, (torch.randn(2, 8),)).graph
    names = [layer.name for layer in graph.searchable_layers]
    space = SearchSpace(graph, tuple(LayerChoice(name, WIDTHS) for name in names), ())
    scale = np.geomspace(1.0, 4.0, len(names))
    hessian = np.diag(scale**2)
    start = 0
    for number, depth in enumerate(depths):
        for i in range(start, start + depth):
            for j in range(start, start + depth):
                if i != j:
                    hessian[i, j] = (-1) ** number * coupling / (depth - 1) * scale[i] * scale[j]
        start += depth
    return QuadraticTask(space, hessian)


def every(task):
    """(loss, size) of every candidate."""
    names = [choice.name for choice in task.space.layers]
    candidates = (Candidate.of(dict(zip(names, w, strict=True)))
                  for w in product(WIDTHS, repeat=len(names)))  # fmt: skip
    return np.array([(task.loss(c), task.size_bytes(c)) for c in candidates])


def test_pair_terms_find_the_optimum_that_single_losses_miss():
    task = task_of(2, 2, coupling=0.5)
    context = QuadraticContext(task)
    table = measure_table(context)
    additive, paired = Program(context, table), Program(context, with_pairs(context, table))
    missed, all_of_them = 0, every(task)
    for size in range(180, 310, 8):
        best = all_of_them[all_of_them[:, 1] <= size, 0].min()
        assert task.loss(paired.solve(size)) == pytest.approx(best, rel=1e-9)
        missed += task.loss(additive.solve(size)) > best * 1.001
    assert missed >= 3


def test_errors_that_nearly_cancel_are_seen_too():
    task = task_of(2, 2, coupling=0.9)
    context = QuadraticContext(task)
    table = measure_table(context)
    programs = [Program(context, table), Program(context, with_pairs(context, table))]
    all_of_them, excess = every(task), []
    for size in range(180, 310, 8):
        best = all_of_them[all_of_them[:, 1] <= size, 0].min()
        excess.append([task.loss(program.solve(size)) / best - 1 for program in programs])
    additive, paired = np.mean(excess, axis=0)
    assert additive > 0.5
    assert paired < 0.01


def test_blocks_of_three_layers_are_one_group_and_predicted_exactly():
    task = task_of(3, 2, 1, coupling=0.5)
    context = QuadraticContext(task)
    table = with_pairs(context, measure_table(context))
    assert table.members == ((0, 1, 2), (3, 4), (5,))
    found = Program(context, table).solve(300)
    widths = [choice.bit_widths for choice in task.space.layers]
    for group, members in enumerate(table.members):
        for at, position in enumerate(table.products[group]):
            names = [task.space.layers[g].name for g in members]
            chosen = [widths[g][p] for g, p in zip(members, position, strict=True)]
            exact = task.loss_of(dict(zip(names, chosen, strict=True)))
            if max(chosen) <= 3:
                assert table.losses[group][at] == pytest.approx(exact)
    assert task.size_bytes(found) <= 300


def test_dominated_products_are_dropped():
    context = QuadraticContext(task_of(2, 2))
    table = with_pairs(context, measure_table(context))
    for losses, sizes in zip(table.losses, table.costs["size_bytes"], strict=True):
        order = np.argsort(sizes)
        assert len(losses) < len(WIDTHS) ** 2
        assert (np.diff(losses[order]) < 0).all()


def test_probes_are_at_most_twice_those_of_single_layers_and_only_inside_blocks():
    context = QuadraticContext(task_of(4, 3, 2, 1))
    table = measure_table(context)
    singles = context.n_probes
    found = with_pairs(context, table)
    assert 0 < context.n_probes - singles <= 2 * singles
    blocks = [set(block) for block in _blocks(context, table)]
    assert all(any(set(members) <= block for block in blocks) for members in found.members)


def test_what_cannot_change_the_loss_is_not_probed():
    context = QuadraticContext(task_of(2, 2))
    table = measure_table(context)
    # a layer that loses next to nothing has no term worth a probe
    quiet = table.rescaled([1.0, 1e-9, 1.0, 1.0])
    pairs = worthwhile(block_table(quiet, {}), _blocks(context, table))
    assert pairs
    assert not any(1 in pair.groups for pair in pairs)


def test_a_block_whose_products_are_too_many_is_parted():
    context = QuadraticContext(task_of(6))
    table = with_pairs(context, measure_table(context))
    assert max(map(len, table.members)) == 4
    assert max(map(len, table.losses)) <= len(WIDTHS) ** 4 <= MOST_PRODUCTS


@pytest.mark.parametrize("name", ["rate-distortion", "auto"])
def test_the_setting_reaches_the_program(name):
    task = task_of(2, 2)
    counts = []
    for pairs in ("false", "true"):
        context = QuadraticContext(task, {"size_bytes": 300.0}, trials=20)
        run_to_end(make_strategy(name, {"pairs": pairs, "points": "12"}), context)
        counts.append(context.n_probes)
    assert counts[1] > counts[0]


def test_predictions_are_compared_with_and_without_pair_terms():
    task = task_of(2, 2)
    context = QuadraticContext(task, {"size_bytes": 300.0})
    context.strategy = "rate-distortion"
    table = measure_table(context)
    pairs = worthwhile(block_table(table, {}), _blocks(context, table))
    names = [choice.name for choice in task.space.layers]
    probes = [({n: w}, task.loss_of({n: w})) for n in names for w in WIDTHS]
    for pair in pairs:
        change = {names[g]: WIDTHS[at] for g, at in zip(pair.groups, pair.choices, strict=True)}
        probes.append((change, task.loss_of(change)))
    program = Program(context, table)
    found = [program.solve(size) for size in range(180, 240, 8)]
    evaluations = [
        Evaluation(c, task.loss(c), None, {"size_bytes": 1.0}, strategy="rate-distortion")
        for c in dict.fromkeys(found)
    ]
    report = compared(probes, evaluations)
    assert report.n_candidates == len(evaluations)
    assert report.n_pairs == len(pairs)
    assert report.with_pairs.median_ratio == pytest.approx(1.0, abs=0.02)
    assert abs(report.additive.median_ratio - 1.0) > 0.05
    assert report.with_pairs.rank_correlation == 1.0
    assert compared(probes, evaluations[:2]) is None
    assert compared(probes[: 4 * len(WIDTHS)], evaluations).with_pairs is None


def test_gradients_do_not_predict_pairs(tiny_tasks, tmp_path):
    config = RunConfig(
        task="x", settings={"auto.pairs": "true"}, distortion="linearized", threads=1
    )
    with pytest.raises(UsageError, match=r"auto\.pairs=true needs --distortion exact"):
        run_search(tiny_tasks.mlp(), config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_logs_its_pairs_and_a_resumed_one_measures_none_again(search_call, tiny, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--strategy", "rate-distortion", "--set", "rate-distortion.pairs=true",
                 "--set", "rate-distortion.points=8")  # fmt: skip
    answer = search_call("run", "--task", tiny("cnn"), *arguments, "--trials", 4, "--out", folder)
    assert answer.code == 0, answer.stderr
    log = folder / "probes.jsonl"
    changes = [json.loads(json.loads(line)[0]) for line in log.read_text().splitlines()]
    pairs = [change for change in changes if len(change) == 2]
    assert pairs
    assert len(pairs) <= 2 * (len(changes) - len(pairs))
    assert len({ProbeLog.key(change) for change in changes}) == len(changes)
    before = log.read_bytes()
    assert search_call("run", "--resume", folder, "--trials", 12).code == 0
    assert log.read_bytes() == before
    shown = search_call("report", folder)
    assert f"with {len(pairs)} pair terms: median" in shown.stdout
    told = json.loads(search_call("report", folder, "--json").stdout)["prediction"]
    assert told["n_pairs"] == len(pairs)
    assert told["with_pairs"]["median_ratio"] > 0
