"""Widths learned by gradient descent: what every such strategy does with its method."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from quant_ops.candidate import Candidate
from quant_ops.errors import BudgetError, UsageError
from quant_ops.learned_widths.base import LearnedWidths
from search.atomic import write_text
from search.budget import format_size
from search.evaluation import Evaluation
from search.strategies.gradient_settings import GradientSettings
from search.strategies.width_choice import WidthChoice, learned_layers
from search.strategies.width_learning import WidthLearning
from search.strategy import Context, Strategy, Traits
from search.training.checkpoint import read_checkpoint, write_checkpoint
from search.training.log import read_log
from search.training.pace import SPARE, TIMED_STEPS, seconds_per_step
from search.training.settings import TrainingSettings
from search.training.trainable import Trainable
from search.training.trainer import Hooks, Trainer

DEFAULT_STEPS = 3000
DEFAULT_WIDTHS = (4, 3, 2)  # sizes of these uniform widths, where none is asked for
STATE = "state.json"


@dataclass(frozen=True)
class Point:
    """Widths and trained float parameters to go on from."""

    candidate: Candidate
    params: Mapping[str, Tensor]


class GradientStrategy(Strategy):
    """Learns widths while it trains the weights, once for each size asked for, largest first.

    Of one size: the widths are learned under a price on the expected size that a controller
    moves, with points recorded on the way; then the widths are fixed, such that the file is as
    long as the budget allows, and the rest of the steps trains the weights at these widths with
    learned steps. The next smaller size starts from the result [Shen2021], the first one from the
    best candidate of its size that another strategy has measured, if there is one. Budgets other
    than the size are checked, not aimed at.
    """

    method: ClassVar[type[LearnedWidths]]
    settings: GradientSettings

    def run(self, context: Context) -> None:
        trainable = context.training()
        if not learned_layers(context.space):
            raise UsageError(
                f"{self.name} has no width to learn: every layer is pinned or has one legal "
                f"width; allow more with --bits, or train at these widths with --finetune"
            )
        choice = WidthChoice.of(context)
        sizes = self._sizes(context, choice)
        folder = context.folder(self.name)
        steps = self._steps(trainable, choice, folder, len(sizes))
        start: Point | None = None
        for size in sizes:
            if size != sizes[0] and context.should_stop():
                return
            begun = start or self._recorded(context, trainable, size)
            one = _OneSize(self, context, trainable, choice, size, steps, folder, begun)
            found = one.run()
            start = found if self.settings.inherit else None

    def learning(
        self, context: Context, trainable: Trainable, choice: WidthChoice, budget_bytes: int
    ) -> WidthLearning:
        """The first part for one size."""
        return WidthLearning(self.method, self.settings, context, trainable, choice, budget_bytes)

    def _recorded(self, context: Context, trainable: Trainable, size: int) -> Point | None:
        """The widths of the best candidate of that size that another strategy has measured."""
        if not self.settings.warm:
            return None
        others = [
            e
            for e in context.history()
            if not (e.recipe or e.pruned or e.strategy == self.name) and e.size_bytes <= size
        ]
        best = min(others, key=lambda e: (e.loss, e.size_bytes), default=None)
        return None if best is None else Point(best.candidate, trainable.traced.params)

    def _sizes(self, context: Context, choice: WidthChoice) -> tuple[int, ...]:
        """Largest first; each can be met.

        Raises:
            BudgetError: one of them is below the floor.
        """
        if not context.sizes:
            wanted = (context.size_of(context.space.uniform(b)) for b in DEFAULT_WIDTHS)
            return tuple(sorted(set(wanted), reverse=True))
        for size in context.sizes:
            try:
                choice.filled(choice.widest(), size)
            except BudgetError as error:
                raise BudgetError(f"{self.name} cannot reach --budget {size:,}: {error}") from error
        return tuple(reversed(context.sizes))

    def _steps(self, trainable: Trainable, choice: WidthChoice, folder: Path, n_sizes: int) -> int:
        """Steps for each size: given, or timed once and kept."""
        asked = self.settings.steps or trainable.settings.steps
        path = folder / STATE
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if not asked and "steps" not in known:
            steps = DEFAULT_STEPS
            if trainable.seconds is not None:
                steps = self._timed(trainable, choice, trainable.seconds / n_sizes)
            known["steps"] = steps
            write_text(path, json.dumps(known) + "\n")
        steps = asked or known["steps"]
        trainable.listener.on_phase(f"{self.name}: {steps:,} steps for each of {n_sizes} sizes")
        return max(int(steps), 2)

    def _timed(self, trainable: Trainable, choice: WidthChoice, seconds: float) -> int:
        trainable.listener.on_phase("timing a few training steps")
        start, params = choice.widest(), trainable.traced.params
        model = trainable.prepared.evaluator.bank.quantize(start)
        learning = self.learning(choice.context, trainable, choice, choice.context.size_of(start))
        timed = replace(trainable.settings, steps=TIMED_STEPS)

        def fixed(settings: TrainingSettings) -> Trainer:
            return trainable.trainer(trainable.network(model, settings), settings)

        share = self.settings.learning
        learned = learning.trainer(Point(start, params), timed, harvests=False)
        per_step = share * seconds_per_step(lambda _: learned, timed)
        per_step += (1 - share) * seconds_per_step(fixed, timed)
        return max(2, int(seconds * SPARE / per_step))


class _OneSize:
    """Everything that is done for one size; both parts leave a file, so that a run can go on."""

    def __init__(
        self,
        strategy: GradientStrategy,
        context: Context,
        trainable: Trainable,
        choice: WidthChoice,
        size_bytes: int,
        steps: int,
        folder: Path,
        start: Point | None,
    ) -> None:
        self._name, self._settings = strategy.name, strategy.settings
        self._context, self._trainable, self._choice = context, trainable, choice
        self._size_bytes = size_bytes
        self._folder = folder
        self._start = start or Point(choice.widest(), trainable.traced.params)
        self._learning = strategy.learning(context, trainable, choice, size_bytes)
        n_learning = min(max(1, round(strategy.settings.learning * steps)), steps - 1)
        self._learning_steps, self._fixed_steps = n_learning, steps - n_learning
        self._label = f"{self._name}-{size_bytes}-{self._key()}"

    def run(self) -> Point:
        """The trained point of this size."""
        done = self._read("final")
        if done is not None:
            return done
        learned = self._read("widths") or self._learn()
        found = self._train(learned)
        self._path("widths").unlink(missing_ok=True)
        return found

    def _learn(self) -> Point:
        settings = self._part(self._learning_steps, folded_share=0.0, average=0.0)
        self._phase("learning widths", settings.steps)
        learning = self._learning
        learning.remember(self._path("harvested", ".json"))
        checkpoint = self._path("learning")
        trainer = learning.trainer(
            self._start, settings, checkpoint=checkpoint, log=self._log("learning")
        )
        network = trainer.run()
        self._say(trainer)
        point = Point(learning.final(), network.float_params())
        self._write("widths", point, {"stopped": trainer.stopped})
        checkpoint.unlink(missing_ok=True)
        return point

    def _train(self, start: Point) -> Point:
        trainable = self._trainable
        settings = self._part(self._fixed_steps)
        self._phase("training at these widths", settings.steps)
        model = trainable.quantized(start.params, start.candidate)
        checkpoint, log = self._path("training"), self._log("training")
        listener = trainable.listener
        trainer = trainable.trainer(
            trainable.network(model, settings, params=start.params),
            settings,
            checkpoint=checkpoint,
            log=log,
            hooks=Hooks(on_progress=lambda d, n, loss: listener.on_step(d, n, f"loss {loss:.4g}")),
        )
        network = trainer.run().cpu()
        self._say(trainer)
        evaluation = self._context.submit(
            start.candidate, network.to_model(), recipe=self._name, parent=None
        )
        self._note(evaluation, trainer.stopped)
        point = Point(start.candidate, network.float_params())
        self._write("final", point, {"trial": evaluation.trial})
        checkpoint.unlink(missing_ok=True)
        return point

    def _part(self, steps: int, **changes: Any) -> TrainingSettings:
        """Of one of both parts, at the rate of a training of both: the second mends the first."""
        both = replace(self._trainable.settings, steps=self._learning_steps + self._fixed_steps)
        return replace(both, steps=steps, rate=both.peak_rate, **changes)

    def _note(self, evaluation: Evaluation, stopped: str) -> None:
        """Both logs as one, and what the dashboard wants to know of the trial."""
        rows = read_log(self._log("learning"))
        for row in read_log(self._log("training")):
            rows.append({**row, "step": row["step"] + self._learning_steps})
        path = self._log("")
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        steps = self._learning_steps + self._fixed_steps
        facts = {"steps": steps, "stopped": stopped, "log": path.name}
        self._trainable.note(evaluation.trial, facts)

    def _key(self) -> str:
        """Of what a result depends on beside the size: other settings or widths start anew."""
        space = self._context.space
        said = [
            asdict(self._settings),
            asdict(replace(self._trainable.settings, checkpoint_s=0.0, steps=0)),
            [(c.name, c.bit_widths, c.groups) for c in space.layers],
            [(e.name, e.bit_widths) for e in space.activations],
            (self._learning_steps, self._fixed_steps, self._context.seed),
            self._start.candidate.digest(),
        ]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=4).hexdigest()

    def _path(self, part: str, suffix: str = ".safetensors") -> Path:
        return self._folder / f"{self._label}-{part}{suffix}"

    def _log(self, part: str) -> Path:
        return self._trainable.logs / f"{self._label}{'-' * bool(part)}{part}.jsonl"

    def _write(self, part: str, point: Point, facts: Mapping[str, Any]) -> None:
        state = {"candidate": point.candidate.to_json(), **facts}
        write_checkpoint(self._path(part), point.params, state)

    def _read(self, part: str) -> Point | None:
        path = self._path(part)
        if not path.exists():
            return None
        params, state = read_checkpoint(path)
        return Point(Candidate.from_json(state["candidate"]), params)

    def _phase(self, what: str, steps: int) -> None:
        size = format_size(self._size_bytes)
        self._trainable.listener.on_phase(f"{self._name} {size}: {what}, {steps:,} steps")

    def _say(self, trainer: Trainer) -> None:
        if trainer.stopped:
            self._trainable.listener.on_phase(trainer.stopped)


def traits_of(summary: str) -> Traits:
    """The row of a strategy that learns widths."""
    return Traits(
        summary,
        granularity=("layer", "group", "channel"),
        activations=False,
        needs_training=True,
        parallel=False,
        cost_per_trial="one training per size",
    )
