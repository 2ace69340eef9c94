"""The training loop: one for finetuning at given widths and for widths that are learned."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from quant_ops.learned_widths.base import LearnedWidths
from quant_ops.qat.activations import LearnedActivation
from quant_ops.qat.averages import Averages
from quant_ops.qat.network import QuantizedNetwork
from quant_ops.qat.oscillation import Oscillations, dampening
from quant_ops.qat.weights import LearnedStep
from search.blame import blaming
from search.data import channels_last
from search.task import Batch
from search.training.broken import broken_layer
from search.training.checkpoint import (
    load_optimizer,
    optimizer_tensors,
    prefixed,
    read_checkpoint,
    with_prefix,
    write_checkpoint,
)
from search.training.loader import EpochLoader, Position, random_states_kept
from search.training.log import TrainingLog
from search.training.objective import Objective
from search.training.settings import TrainingSettings

_LOGGED_STEPS = 100  # a row of the log at least that often
_SCALES = ("log_", "zero_point")  # how names of steps, clips and gammas begin

Penalty = Callable[[QuantizedNetwork, float], Tensor]
"""(network, share of the training that is done) -> what is added to the loss, ()."""


@dataclass(frozen=True)
class Hooks:
    """What a method adds to the loop.

    Attributes:
        penalty: added to the loss.
        after_step: called with the number of steps done; may change what is learned.
        on_progress: called as (steps done, steps in all, loss).
    """

    penalty: Penalty | None = None
    after_step: Callable[[int], None] = lambda done: None
    on_progress: Callable[[int, int, float], None] = lambda done, total, loss: None


@dataclass
class _Progress:
    step: int = 0
    position: Position = field(default_factory=Position)
    loss_sum: float = 0.0
    n_losses: int = 0


class Trainer:
    """Trains a network in place; afterwards it is folded and holds the result of the recipe.

    A module inside of the network that has a method `progress(share)` is told before each step
    which share of the training is done.

    Args:
        network: what to train, with or without norms.
        loader: training data.
        objective: what to minimise.
        settings: with a number of steps.
        norm_batches: data on which norms are estimated before they are folded.
        checkpoint: file to go on from and to write to, None for none.
        log: JSON-lines file, None for none.
        hooks: see `Hooks`.
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        loader: EpochLoader,
        objective: Objective,
        settings: TrainingSettings,
        *,
        norm_batches: Iterable[Any] = (),
        checkpoint: Path | None = None,
        log: Path | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        if settings.steps < 1:
            raise ValueError("the number of steps is not known yet; see search.training.pace")
        self.network = network
        self.stopped = ""
        self._loader, self._objective, self._settings = loader, objective, settings
        self._norm_batches = norm_batches
        self._path = checkpoint
        self.hooks = hooks or Hooks()
        self._device = network.has_norms.device
        self._watching = settings.dampening > 0 or settings.freezing < 1
        self._progress = _Progress()
        self._optimizer = make_optimizer(network, settings)
        self._averages = Averages(network, settings.average)
        self._oscillations = self._new_oscillations()
        if checkpoint is not None and checkpoint.exists():
            self._load(*read_checkpoint(checkpoint))
        self._log = TrainingLog(log, until=self._progress.step)
        self._snapshot = self._tensors()

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return self._progress.step

    def run(self) -> QuantizedNetwork:
        """Train to the end, or until a loss or gradient is not finite: see `stopped`."""
        progress, saved = self._progress, time.monotonic()
        self.network.train()
        with random_states_kept():
            batches = self._loader.batches(progress.position)
            while progress.step < self._settings.steps and not self.stopped:
                position, batch = next(batches)
                loss = self._step(batch)
                if self.stopped:
                    break
                self._count(position, loss)
                self.hooks.on_progress(progress.step, self._settings.steps, loss)
                if time.monotonic() - saved >= self._settings.checkpoint_s:
                    self.save()
                    saved = time.monotonic()
        if self.stopped:
            self._put(self._snapshot)
        self.save()
        return self._finish()

    def save(self) -> None:
        """Write the checkpoint, and remember the state in case the next steps break it."""
        self._snapshot = {name: t.detach().clone() for name, t in self._tensors().items()}
        if self._path is not None:
            write_checkpoint(self._path, self._snapshot, self._state())

    def _step(self, batch: Batch) -> float:
        settings, network, step = self._settings, self.network, self._progress.step
        if step == settings.fold_at:
            self._fold()
        for module in network.modules():
            told = getattr(module, "progress", None)
            if callable(told):
                told(step / settings.steps)
        set_rate(self._optimizer, settings.rate_at(step))
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(value) or not clipped(network, settings.clip):
            self._stop(value, batch)
            return value
        self._optimizer.step()
        threshold = settings.grown(settings.freezing, step, 1.0)
        for name, watch in self._oscillations.items():
            watch.update(network.trained_layers()[name], threshold)
        self._averages.update(network)
        self.hooks.after_step(step + 1)
        return value

    def _loss(self, batch: Batch) -> Tensor:
        settings, step = self._settings, self._progress.step
        inputs, target = on_device(batch, self._device)
        with autocast(settings.precision, self._device):
            with blaming("the network cannot be run on the task's training data"):
                outputs = self.network(*inputs)
            loss = self._objective(outputs, inputs, target)
        if settings.dampening > 0:
            weight = settings.grown(settings.dampening, step)
            layers = self.network.trained_layers()
            loss = (
                loss
                + weight * torch.stack([dampening(layers[n]) for n in self._oscillations]).sum()
            )
        clips = [
            m for m in self.network.activations if isinstance(m, LearnedActivation) and m.clips
        ]
        if clips:
            squares = torch.stack([m.clip().square() for m in clips])
            loss = loss + settings.weight_decay * squares.sum()
        if self.hooks.penalty is not None:
            loss = loss + self.hooks.penalty(self.network, step / settings.steps)
        return loss

    def _fold(self) -> None:
        if bool(self.network.has_norms.any()):
            self.network.estimate_norms(self._norm_batches)
            self.network.fold_norms()
        self._averages = Averages(self.network, self._settings.average)
        self.save()  # what broke later must not bring norms back

    def _count(self, position: Position, loss: float) -> None:
        progress = self._progress
        ends_epoch = position.epoch > progress.position.epoch
        progress.step += 1
        progress.position = position
        if (ends_epoch or progress.n_losses >= _LOGGED_STEPS) and progress.n_losses:
            self._add_row()
        progress.loss_sum += loss
        progress.n_losses += 1
        if progress.step == self._settings.steps:
            self._add_row()

    def _add_row(self) -> None:
        progress = self._progress
        row = {
            "step": progress.step,
            "epoch": progress.position.epoch,
            "loss": progress.loss_sum / progress.n_losses,
            "rate": self._settings.rate_at(progress.step - 1),
            "mean_bits": mean_bits(self.network),
        }
        watches = list(self._oscillations.values())
        if watches:
            row["oscillating"] = share(w.frequency > 0.005 for w in watches)
            row["frozen"] = share(w.frozen for w in watches)
        self._log.add(row)
        progress.loss_sum, progress.n_losses = 0.0, 0

    def _finish(self) -> QuantizedNetwork:
        network = self.network
        if self._settings.average > 0:
            self._averages.copy_to(network)
        network.eval()  # a relaxation's gates would scale what norms are estimated on
        if bool(network.has_norms.any()):
            network.estimate_norms(self._norm_batches)
            network.fold_norms()
        return network.eval()

    def _stop(self, loss: float, batch: Batch) -> None:
        layer = broken_layer(self.network, on_device(batch, self._device)[0])
        what = "loss" if not math.isfinite(loss) else "gradient"
        self.stopped = (
            f"training stopped at step {self._progress.step + 1} of {self._settings.steps}: the "
            f"{what} is not finite, layer {layer!r} first; the last sound state is kept; lower "
            f"--set finetune.rate=... (it was {self._settings.peak_rate:g})"
        )

    def _new_oscillations(self) -> dict[str, Oscillations]:
        if not self._watching:
            return {}
        return {
            name: Oscillations(layer).to(self._device)
            for name, layer in self.network.trained_layers().items()
            if isinstance(layer.quantizer, LearnedStep)
        }

    def _tensors(self) -> dict[str, Tensor]:
        out = prefixed("network", self.network.state_dict())
        out |= prefixed("optimizer", optimizer_tensors(self._optimizer))
        out |= prefixed("averages", self._averages.state_dict())
        for name, watch in self._oscillations.items():
            out |= prefixed(f"oscillations/{name}", watch.state_dict())
        return out

    def _state(self) -> dict[str, Any]:
        progress = asdict(self._progress)
        return {"progress": progress, "settings": asdict(self._settings), "stopped": self.stopped}

    def _load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        now = asdict(self._settings)
        differ = [
            k for k, v in state["settings"].items() if k != "checkpoint_s" and now.get(k) != v
        ]
        if differ:
            raise UsageError(
                f"the checkpoint {self._path} is of a training with other settings "
                f"({', '.join(differ)}); give those again, or delete it to train from the start"
            )
        progress = dict(state["progress"])
        position = Position(**progress.pop("position"))
        self._progress = _Progress(position=position, **progress)
        self.stopped = state["stopped"]
        self._put(tensors)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(with_prefix("network", tensors))
        self._averages = Averages(self.network, self._settings.average)
        self._averages.load_state_dict(with_prefix("averages", tensors))
        load_optimizer(self._optimizer, with_prefix("optimizer", tensors))
        for name, watch in self._oscillations.items():
            watch.load_state_dict(with_prefix(f"oscillations/{name}", tensors))


def make_optimizer(network: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Latent weights decay; steps and gammas, and learned widths, have rates of their own."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    latent = [p for n, p in named if n.endswith("latent")]
    scales = [p for n, p in named if n.rpartition(".")[2].startswith(_SCALES)]
    widths = width_parameters(network)
    known = {id(p) for p in (*latent, *scales, *widths)}
    groups: list[dict[str, Any]] = [
        {"params": latent, "weight_decay": settings.weight_decay, "relative": 1.0},
        {"params": scales, "weight_decay": 0.0, "relative": settings.step_rate},
        {"params": widths, "weight_decay": 0.0, "relative": settings.width_rate},
        {
            "params": [p for _, p in named if id(p) not in known],
            "weight_decay": 0.0,
            "relative": 1.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, settings.peak_rate, momentum=0.9, nesterov=True, foreach=True
        )
    return torch.optim.AdamW(groups, settings.peak_rate, foreach=True)


def width_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What decides on learned widths: all of their modules but steps and ranges."""
    modules = (m for m in network.modules() if isinstance(m, LearnedWidths))
    named = (pair for module in modules for pair in module.named_parameters())
    return [p for n, p in named if not n.rpartition(".")[2].startswith(_SCALES)]


def clipped(network: nn.Module, limit: float) -> bool:
    """Bring the gradient's norm down to `limit` (0: leave it); False where it is not finite.

    What decides on learned widths is clipped apart: a price of the size that grows must not
    shrink the gradient of the weights.
    """
    widths = width_parameters(network)
    apart = {id(p) for p in widths}
    for part in ([p for p in network.parameters() if id(p) not in apart], widths):
        gradients = [p.grad for p in part if p.grad is not None]
        if not gradients:
            continue
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if not bool(torch.isfinite(norm)):
            return False
        if limit:
            torch.nn.utils.clip_grads_with_norm_(part, limit, norm, foreach=True)
    return True


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, relative ones accordingly."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative"]


def on_device(batch: Batch, device: torch.device) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs and target on a device, images with channels last."""
    inputs, target = batch
    moved = pytree.tree_map(
        lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, target
    )
    return tuple(channels_last(x.to(device, non_blocking=True)) for x in inputs), moved


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of forward and backward passes; "auto" is bfloat16 on a GPU only."""
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else "bfloat16"
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def mean_bits(network: QuantizedNetwork) -> dict[str, float]:
    """Layer name to the mean width of its channels, of quantizers that know theirs."""
    found = {}
    for name, layer in network.trained_layers().items():
        bits = getattr(layer.quantizer, "mean_bits", None)
        if callable(bits):
            found[name] = float(bits().detach().float().mean())
    return found


def share(masks: Iterable[Tensor]) -> float:
    """Share of true entries over all masks."""
    pairs = [(int(mask.sum()), mask.numel()) for mask in masks]
    return sum(hits for hits, _ in pairs) / max(1, sum(n for _, n in pairs))
