"""What a strategy sees of the engine: evaluation, history, limits; everything recorded."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cost_models.base import CostModel
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from search.early_stop import Incumbent, Incumbents
from search.evaluation import CODED, Evaluation
from search.evaluator import Evaluator
from search.finish import packed_path
from search.front import BASELINES
from search.journal import writing
from search.record import Record
from search.runners.base import Job, Runner
from search.space import SearchSpace
from search.strategy import ChannelFacts, ChannelLosses, Remaining, SearchOver

if TYPE_CHECKING:
    from search.training.trainable import Trainable

EDGE_PREFIX = "edge:"
PROBES = "probes.jsonl"
# Proposals depend on the size of a batch: up to two workers propose what one process does.
BATCH_SIZE = 8
JOBS_PER_WORKER = 4
IN_FULL = (*BASELINES, "reallocation")  # strategies whose candidates are never stopped early


@dataclass(frozen=True, slots=True)
class Limits:
    """When a strategy has to end; None is no limit. `deadline` in seconds of `time.monotonic`."""

    trials: int | None
    deadline: float | None


class ProbeLog:
    """Losses of changes of one or two layers, one JSON line each, kept in the run's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the line that was being written when the process was killed
            os.truncate(path, whole)
        for line in content[:whole].splitlines():
            key, loss = json.loads(line)
            self.losses[key] = loss

    @staticmethod
    def key(change: Mapping[str, float]) -> str:
        """Canonical spelling of a change."""
        return json.dumps({name: change[name] for name in sorted(change)})

    def add(self, key: str, loss: float) -> None:
        """Keep one answer, on disk at once."""
        self.losses[key] = loss
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps([key, loss]) + "\n")


class Listener:
    """Told of every finished measurement, for progress displays; this one is silent."""

    def on_phase(self, text: str) -> None:
        """A new part of the work begins."""

    def on_step(self, done: int, total: int, status: str = "") -> None:
        """`done` of `total` steps of the present part are finished."""

    def on_probe(self, done: int, total: int) -> None:
        """A single-layer measurement was finished."""

    def on_report(self, text: str) -> None:
        """A strategy says a few words on its state."""

    def on_evaluation(self, evaluation: Evaluation, known: bool) -> None:
        """A candidate was evaluated, or answered from the record."""


class RunContext:
    """Implements `search.strategy.Context` over a runner and a record.

    On resume a strategy is replayed from its start: a candidate that the record knows is
    answered from there, and `history` shows only what the replay has reached, so that the
    proposals are those of the uninterrupted run. So are the incumbents: a candidate is compared
    with what was reached before its batch was proposed.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        budgets: Mapping[str, float],
        costs: Mapping[str, CostModel],
        seed: int,
        runner: Runner,
        record: Record,
        folder: Path,
        evaluator: Evaluator,
        sizes: tuple[int, ...] = (),
        distortion: str = "exact",
        early_stop: bool = False,
        listener: Listener | None = None,
        trainable: "Callable[[RunContext], Trainable] | None" = None,
    ) -> None:
        self._trainable = trainable
        self.space = space
        self.budgets = budgets
        self.sizes = sizes
        self.costs = costs
        self.seed = seed
        self.batch_size = max(BATCH_SIZE, JOBS_PER_WORKER * runner.n_workers)
        self.strategy = ""
        self._distortion = distortion
        self._channel_losses: ChannelLosses | None = None
        self._channel_facts: dict[str, ChannelFacts] | None = None
        self._limits = Limits(None, None)
        self._runner = runner
        self._record = record
        self.run_folder = folder
        self._evaluator = evaluator
        self.listener = listener or Listener()
        plain = [e for e in record.evaluations() if not e.recipe]
        self._recorded = {e.candidate: e for e in plain if not e.pruned}
        self._stopped = {e.candidate: e for e in plain if e.pruned}
        self._reached: dict[Candidate, Evaluation] = {}
        self._early_stop = early_stop
        self._share_in_full = False
        self._incumbents = Incumbents(("size_bytes", *(n for n in budgets if n != "size_bytes")))
        self._n_used = 0
        self._probes = ProbeLog(folder / PROBES)

    def begin(self, strategy: str, limits: Limits, *, in_full: bool = False) -> None:
        """Enter the share of one strategy; `in_full`: none of its evaluations is stopped early."""
        self.strategy = strategy
        self._share_in_full = in_full
        self._limits = limits
        self._n_used = 0
        self.listener.on_phase(strategy)

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """See `Context.evaluate`."""
        fresh = [c for c in dict.fromkeys(candidates) if not self._is_answered(c)]
        over = False
        if self._limits.trials is not None:
            left = max(0, self._limits.trials - self._n_used)
            over = len(fresh) > left
            fresh = fresh[:left]
        known = {c: e for c in fresh if (e := self._from_record(c)) is not None}
        jobs = self._jobs([c for c in fresh if c not in known])
        for evaluation in known.values():
            self._reach(evaluation, known=True)
        over |= not self._measure(jobs)
        if over:
            raise SearchOver
        return [self._reached[c] for c in candidates]

    def probe(self, changes: Sequence[Mapping[str, float]]) -> list[float]:
        """See `Context.probe`."""
        keys = [ProbeLog.key(change) for change in changes]
        todo = {
            key: change
            for key, change in zip(keys, changes, strict=True)
            if key not in self._probes.losses
        }
        waiting = list(todo)
        if todo and self._distortion != "exact":
            asked = [_candidate_of(change) for change in todo.values()]
            losses = self._evaluator.predict_many(asked, self._distortion)
            for key, found in zip(waiting, losses, strict=True):
                self._probes.add(key, found)
            return [self._probes.losses[key] for key in keys]
        jobs = [Job(_candidate_of(change), "probe") for change in todo.values()]
        for n, (position, loss) in enumerate(self._runner.run(jobs), start=1):
            assert isinstance(loss, float)
            self._probes.add(waiting[position], loss)
            self.listener.on_probe(n, len(jobs))
            if self._out_of_time():
                raise SearchOver
        return [self._probes.losses[key] for key in keys]

    def channel_losses(self) -> ChannelLosses:
        """See `Context.channel_losses`."""
        if self._channel_losses is None:
            layers = (c for c in self.space.layers if len(c.bit_widths) > 1 and not c.residual_of)
            widths = {c.name: c.bit_widths for c in layers}
            self._channel_losses = self._evaluator.channel_losses(widths)
        return self._channel_losses

    def channel_facts(self) -> Mapping[str, ChannelFacts]:
        """See `Context.channel_facts`."""
        if self._channel_facts is None:
            self._channel_facts = self._evaluator.channel_facts()
        return self._channel_facts

    def submit(
        self, candidate: Candidate, model: QuantizedModel, *, recipe: str, parent: int | None = None
    ) -> Evaluation:
        """See `Context.submit`."""
        measured = self._evaluator.measure_model(model)
        packed = PackedModel.from_model(model)
        return self._record_with_file(
            packed,
            Evaluation(
                candidate=candidate,
                loss=measured.loss,
                loss_stderr=measured.loss_stderr,
                metric=measured.metric,
                agreement=measured.agreement,
                costs={name: cost.cost_of(model) for name, cost in self.costs.items()},
                strategy=self.strategy,
                seed=self.seed,
                recipe=recipe,
                parent=parent,
                weights_digest=packed.digest,
            ),
        )

    def submit_coded(self, parent: Evaluation, packed: PackedModel) -> Evaluation:
        """Record the entropy-coded file of a recorded trial: same weights, so the same quality."""
        return self._record_with_file(
            packed,
            replace(
                parent,
                costs={**parent.costs, "size_bytes": float(packed.size_bytes)},
                recipe=" + ".join(filter(None, (parent.recipe, CODED))),
                parent=parent.trial,
                weights_digest=packed.digest,
                seconds=0.0,
            ),
        )

    def _record_with_file(self, packed: PackedModel, evaluation: Evaluation) -> Evaluation:
        (recorded,) = self._record.append([evaluation], self.budgets)
        path = packed_path(self.run_folder, recorded.trial)
        path.parent.mkdir(exist_ok=True)
        packed.save(path)
        self._n_used += 1
        self.listener.on_evaluation(recorded, False)
        return recorded

    def size_of(self, candidate: Candidate) -> int:
        """See `Context.size_of`."""
        return int(self.costs["size_bytes"].cost(self.space.graph, candidate))

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        """See `Context.cost_of`."""
        names = {"size_bytes", *self.budgets}
        return {name: self.costs[name].cost(self.space.graph, candidate) for name in names}

    def training(self) -> "Trainable":
        """See `Context.training`."""
        assert self._trainable is not None, "this context was made without a training task"
        return self._trainable(self)

    def history(self) -> list[Evaluation]:
        """See `Context.history`."""
        return sorted(self._reached.values(), key=lambda e: e.trial)

    def should_stop(self) -> bool:
        """See `Context.should_stop`."""
        trials = self._limits.trials
        return (trials is not None and self._n_used >= trials) or self._out_of_time()

    def remaining(self) -> Remaining:
        """See `Context.remaining`."""
        trials, deadline = self._limits.trials, self._limits.deadline
        return Remaining(
            None if trials is None else max(0, trials - self._n_used),
            None if deadline is None else max(0.0, deadline - time.monotonic()),
        )

    def report(self, text: str) -> None:
        """See `Context.report`."""
        self.listener.on_report(text)

    def folder(self, name: str) -> Path:
        """See `Context.folder`."""
        path = self.run_folder / "checkpoints" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def seconds_left(self) -> float | None:
        """Time left of the present strategy's share; None without a limit."""
        deadline = self._limits.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def n_used(self) -> int:
        """Trials of the present strategy's share that are used up."""
        return self._n_used

    def _out_of_time(self) -> bool:
        deadline = self._limits.deadline
        return deadline is not None and time.monotonic() >= deadline

    @property
    def _in_full(self) -> bool:
        return not self._early_stop or self._share_in_full or self.strategy in IN_FULL

    def _is_answered(self, candidate: Candidate) -> bool:
        reached = self._reached.get(candidate)
        return reached is not None and not (reached.pruned and self._in_full)

    def _from_record(self, candidate: Candidate) -> Evaluation | None:
        """The earliest recorded answer that this strategy may be given."""
        whole, stopped = self._recorded.get(candidate), self._stopped.get(candidate)
        if stopped is None or self._in_full:
            return whole
        return stopped if whole is None or stopped.trial < whole.trial else whole

    def _jobs(self, candidates: Sequence[Candidate]) -> list[Job]:
        if self._in_full:
            return [Job(c) for c in candidates]
        best = {c: self._incumbents.best(self.cost_of(c)) for c in candidates}
        losses = self._sample_losses({e.candidate: e for e in best.values() if e is not None})
        return [
            Job(c, incumbent=None if e is None else Incumbent(e.loss, losses[e.candidate]))
            for c, e in best.items()
        ]

    def _sample_losses(
        self, evaluations: Mapping[Candidate, Evaluation]
    ) -> dict[Candidate, NDArray[np.float32]]:
        """Losses per sample; what a record does not hold is measured again, by the same runner."""
        found = {c: self._incumbents.losses(e) for c, e in evaluations.items()}
        missing = [c for c, losses in found.items() if losses is None]
        for position, result in self._runner.run([Job(c) for c in missing]):
            assert isinstance(result, Evaluation)
            assert result.sample_losses is not None
            found[missing[position]] = result.sample_losses
            self._incumbents.remember(evaluations[missing[position]], result.sample_losses)
        return {c: losses for c, losses in found.items() if losses is not None}

    def _reach(
        self,
        evaluation: Evaluation,
        *,
        known: bool,
        losses: NDArray[np.float32] | None = None,
    ) -> None:
        self._reached[evaluation.candidate] = evaluation
        self._incumbents.add(evaluation, losses)
        self._n_used += 1
        self.listener.on_evaluation(evaluation, known)

    def _measure(self, jobs: Sequence[Job]) -> bool:
        """Evaluate and record; False when time ran out first.

        Results are recorded in proposal order as far as they are complete, so that trial
        numbers do not depend on which worker was faster.
        """
        done: dict[int, Evaluation] = {}
        written = 0
        for position, result in self._runner.run(jobs):
            assert isinstance(result, Evaluation)
            done[position] = replace(result, strategy=self.strategy, seed=self.seed)
            ready = []
            while written in done:
                ready.append(done.pop(written))
                written += 1
            self._keep(ready)
            if self._out_of_time() and written < len(jobs):
                self._keep(list(done.values()))
                return False
        return True

    def _keep(self, evaluations: Sequence[Evaluation]) -> None:
        slim = [replace(e, sample_losses=None) for e in evaluations]
        recorded = self._record.append(slim, self.budgets)
        for evaluation, fresh in zip(recorded, evaluations, strict=True):
            answers = self._stopped if evaluation.pruned else self._recorded
            answers[evaluation.candidate] = evaluation
            self._reach(evaluation, known=False, losses=fresh.sample_losses)


def _candidate_of(change: Mapping[str, float]) -> Candidate:
    layers = {n: LayerQuant((b,)) for n, b in change.items() if not n.startswith(EDGE_PREFIX)}
    edges = {
        n.removeprefix(EDGE_PREFIX): int(b) for n, b in change.items() if n.startswith(EDGE_PREFIX)
    }
    return Candidate.of(layers, edges)
