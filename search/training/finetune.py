"""Training of finished points at their widths: each result is a new trial."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quant_ops.correction import reestimate_norms
from quant_ops.distill import DistillationSettings, distill, kl_loss, squared_loss
from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from quant_ops.reduced import Reduction
from search.config import RunConfig, read_config, store_settings
from search.context import Listener, RunContext
from search.durations import format_duration
from search.evaluation import Evaluation
from search.finish import packed_path
from search.front import FrontInfo, ParetoFront
from search.plots import thinned
from search.prepare import Prepared
from search.quality import is_kl
from search.reallocation import as_searched
from search.record import Record
from search.reopened import reopen
from search.settings import settings_of
from search.task import Task
from search.training.checkpoint import read_checkpoint
from search.training.device import training_device
from search.training.loader import EpochLoader
from search.training.log import LOGS, TRAINED
from search.training.pace import steps_within
from search.training.settings import SETTINGS_OF, TrainingSettings
from search.training.swaps import swapped
from search.training.trainable import Trainable
from search.training.trainer import Hooks, Trainer

RECIPE = "finetune"
MAX_POINTS = 4  # of the front, where no size is asked for: they share the time


class Finetuning:
    """Trains points of one run; the number of steps is settled once for all of them.

    Args:
        prepared: the task.
        context: records what comes out.
        record: of the run.

    Raises:
        UsageError: the task has no training data, the network nothing to train, or a setting
            does not fit.
    """

    def __init__(self, prepared: Prepared, context: RunContext, record: Record) -> None:
        self._prepared, self._context, self._record = prepared, context, record
        self._config = prepared.config
        self._settings = training_settings(prepared.config)
        self._trainable = Trainable.of(prepared, context, record)
        self._norm_batches = prepared.spec.splits["calibration"].batches

    def finetune(self, points: Sequence[Evaluation], seconds: float | None) -> list[Evaluation]:
        """Train those points that no trained trial names as its parent; they share the time.

        Raises:
            UsageError: neither a time nor a number of steps is given.
        """
        known = {e.parent: e for e in self._record.evaluations() if e.recipe == RECIPE}
        return self.train([p for p in points if p.trial not in known], seconds, len(points))

    def train(
        self, todo: Sequence[Evaluation], seconds: float | None, n_points: int = 1
    ) -> list[Evaluation]:
        """Train these points, `n_points` of which share the time."""
        if todo and not self._settings.steps:
            self._settle_steps(todo[0], seconds, n_points)
        out = []
        for number, point in enumerate(todo, start=1):
            self._context.listener.on_phase(
                f"training trial {point.trial} ({number} of {len(todo)}, "
                f"{self._settings.steps:,} steps)"
            )
            out.append(self._train(point))
        return out

    def _settle_steps(self, point: Evaluation, seconds: float | None, n_points: int) -> None:
        n_parts = self._settings.swaps + 1
        begun = [p for p in (self._checkpoint(point), *self._parts(point)) if p.exists()]
        if begun:  # a training that was killed goes on with the steps it had
            _, state = read_checkpoint(begun[0])
            steps = n_parts * state["settings"]["steps"]
            self._settings = replace(self._settings, steps=steps)
            return
        if seconds is None:
            raise UsageError("training needs a time or --set finetune.steps=N; give --finetune 30m")
        self._context.listener.on_phase("timing a few training steps")
        share = seconds / n_points
        start = self._reduction(self._start_of(point))
        steps = steps_within(share, lambda s: self._trainer(start, s), self._settings)
        steps = max(1, steps // n_parts) * n_parts  # any part then tells how many there are
        self._settings = replace(self._settings, steps=steps)
        store_settings(self._context.run_folder, {f"{SETTINGS_OF}.steps": str(steps)})
        self._context.listener.on_phase(
            f"{steps:,} steps for each of {n_points} points in {format_duration(share)}"
        )

    def _train(self, point: Evaluation) -> Evaluation:
        checkpoint = self._checkpoint(point)
        log = self._context.run_folder / LOGS / f"{point.trial}.jsonl"
        model, settings = self._with_swaps(point)
        reduction = self._reduction(model)
        trainer = self._trainer(reduction, settings, checkpoint=checkpoint, log=log)
        network = trainer.run()
        if trainer.stopped:
            self._context.listener.on_phase(trainer.stopped)
        model = self._ended(reduction.widened(network.cpu().to_model()))
        self._context.strategy = point.strategy
        evaluation = self._context.submit(model.candidate, model, recipe=RECIPE, parent=point.trial)
        facts = {"steps": trainer.done, "stopped": trainer.stopped, "log": log.name}
        self._record.add_fact(evaluation.trial, TRAINED, facts)
        for path in (checkpoint, *self._parts(point)):
            path.unlink(missing_ok=True)
        return evaluation

    def _with_swaps(self, point: Evaluation) -> tuple[QuantizedModel, TrainingSettings]:
        """The network after all parts but the last, and the settings of that.

        A part that is finished leaves its checkpoint until the last one is, so that a killed
        training comes to the same widths again.
        """
        model, whole = self._start_of(point), self._settings
        if not whole.swaps:
            return model, whole
        steps = max(1, whole.steps // (whole.swaps + 1))
        whole = replace(whole, rate=whole.peak_rate)  # of parts it is the rate of all of it
        part = replace(whole, steps=steps, folded_share=0.0, average=0.0)
        for number, path in enumerate(self._parts(point), start=1):
            whole_model = Reduction(model, model, self._trainable.traced.params)
            trainer = self._trainer(whole_model, part, checkpoint=path)
            network = trainer.run().cpu()
            if trainer.stopped:
                self._context.listener.on_phase(trainer.stopped)
            params, trained = network.float_params(), network.to_model()
            model = swapped(self._trainable, trained, params, point.size_bytes)
            n_moved = _n_moved(trained, model)
            self._context.listener.on_phase(
                f"moved widths of {n_moved:,} channels ({number} of {whole.swaps})"
            )
        return model, replace(whole, steps=max(1, whole.steps - whole.swaps * steps))

    def _checkpoint(self, point: Evaluation) -> Path:
        return self._context.folder(RECIPE) / f"{point.trial}.safetensors"

    def _parts(self, point: Evaluation) -> list[Path]:
        folder = self._context.folder(RECIPE)
        return [folder / f"{point.trial}-{n}.safetensors" for n in range(self._settings.swaps)]

    def _reduction(self, model: QuantizedModel) -> Reduction:
        """What leaves the network is not trained either."""
        return Reduction.of(model, self._trainable.traced.params)

    def _trainer(
        self,
        start: Reduction,
        settings: TrainingSettings,
        *,
        checkpoint: Path | None = None,
        log: Path | None = None,
    ) -> Trainer:
        listener = self._context.listener
        return self._trainable.trainer(
            self._trainable.network(start.model, settings, params=start.params),
            settings,
            checkpoint=checkpoint,
            log=log,
            hooks=Hooks(on_progress=lambda d, n, loss: listener.on_step(d, n, f"loss {loss:.4g}")),
        )

    def _start_of(self, point: Evaluation) -> QuantizedModel:
        """The recovered codes where the point has some, else the plain ones."""
        if not point.recipe:
            model = self._prepared.evaluator.bank.quantize(point.candidate)
        else:
            read = PackedModel.load(packed_path(self._context.run_folder, point.trial)).model
            model = as_searched(read, self._prepared, point.candidate)
        if not model.layers:
            raise UsageError(
                "there is nothing to train: no layer of the network is quantized; "
                "`search inspect` says why each is kept in float"
            )
        return model

    def _ended(self, model: QuantizedModel) -> QuantizedModel:
        """The optional last steps, which see no label and change no code."""
        prepared, settings = self._prepared, self._settings
        if settings.reestimate:
            model = reestimate_norms(model, prepared.spec.calibration, self._norm_batches)
        if settings.last_epochs:
            model = distill(
                model,
                prepared.traced.params,
                self._norm_batches,
                output_loss=kl_loss if is_kl(prepared.task) else squared_loss,
                settings=DistillationSettings(
                    epochs=settings.last_epochs,
                    batch=None if prepared.traced.static_batch else 32,
                    seed=self._config.seed,
                ),
            )
        return model


def _n_moved(before: QuantizedModel, after: QuantizedModel) -> int:
    pairs = [(before.layers[n].bit_widths, q.bit_widths) for n, q in after.layers.items()]
    return sum(a != b for old, new in pairs for a, b in zip(old, new, strict=True))


def training_settings(config: RunConfig) -> TrainingSettings:
    """What `--set finetune.KEY=VALUE` says."""
    return settings_of(TrainingSettings, config.settings, SETTINGS_OF)


def require_training(task: Task, config: RunConfig) -> None:
    """Refuse what cannot be trained before anything is searched.

    Raises:
        UsageError: no training data, no such device, or a setting that does not fit.
    """
    training_settings(config)
    training_device(config.device)
    EpochLoader(task, config.seed)


def finetune_front(
    prepared: Prepared, context: RunContext, record: Record, info: FrontInfo
) -> list[Evaluation]:
    """Train the best point of every size asked for, else a few of the front; the new trials."""
    evaluations = [e for e in record.evaluations() if prepared.space.contains(e.candidate)]
    points = _worth_training([e for e in evaluations if not e.is_trained], info)
    return Finetuning(prepared, context, record).finetune(points, prepared.config.finetune_s)


def finetune_trial(
    folder: Path,
    trial: int,
    *,
    seconds: float | None,
    device: str = "auto",
    settings: Mapping[str, str] | None = None,
    data: str | None = None,
    listener: Listener | None = None,
) -> Evaluation:
    """Train one trial of a finished run and write its front anew.

    Args:
        folder: of the run.
        trial: its number; a trial that is trained already is trained further.
        seconds: for all of it; None where the settings give steps.
        device: auto, cpu or cuda.
        settings: "finetune.KEY" to value, over those of the run.
        data: folder with the data sets, if it is not that of the run.
        listener: told of progress.

    Raises:
        UsageError: there is no such run or trial, or it cannot be trained.
    """
    config, _ = read_config(folder)
    own = {k: v for k, v in config.settings.items() if k != f"{SETTINGS_OF}.steps"}
    changes = {"settings": {**own, **(settings or {})}, "device": device, "finetune_s": seconds}
    run = reopen(folder, data=data, changes=changes, listener=listener)
    finetuning = Finetuning(run.prepared, run.context, run.record)
    (evaluation,) = finetuning.train([run.trial(trial)], seconds)
    run.write_front()
    return evaluation


def _worth_training(evaluations: Sequence[Evaluation], info: FrontInfo) -> list[Evaluation]:
    front = ParetoFront.of(evaluations, info)
    if not front.points:
        return []
    smallest = front.points[0].size_bytes
    asked = [front.best(size) for size in info.budgets.sizes if size >= smallest]
    chosen = asked or thinned(front.points, MAX_POINTS)
    return sorted({e.trial: e for e in chosen}.values(), key=lambda e: e.size_bytes)
