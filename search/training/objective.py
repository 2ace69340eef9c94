"""What training minimises: the task's loss, mixed with distillation from the float network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from quant_ops.distill import squared_loss
from quant_ops.executor import Executor
from search.blame import blaming
from search.capture import Traced
from search.quality import is_kl
from search.task import Task
from search.training.settings import TrainingSettings


class Objective:
    """(1 - d) * task loss + d * distillation, d = 1 where a batch has no target.

    Distillation is T^2 KL(float || quantized) of logits at temperature T [Hinton2015], for other
    outputs the squared error relative to the float ones.

    Args:
        task: its training loss and kind of outputs.
        traced: the float network.
        settings: share and temperature of the distillation.
        device: of the training.
    """

    def __init__(
        self, task: Task, traced: Traced, settings: TrainingSettings, device: torch.device
    ) -> None:
        self._task, self._settings = task, settings
        self._out_spec = traced.out_spec
        self._is_kl = is_kl(task)
        self._teacher = Executor(traced.graph)
        self._params = {name: tensor.to(device) for name, tensor in traced.params.items()}

    def __call__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], target: Any) -> Tensor:
        """The loss of a batch, ()."""
        share = 1.0 if target is None else self._settings.distill
        floats = [y.float() if y.is_floating_point() else y for y in outputs]
        loss = torch.zeros((), device=floats[0].device)
        if share > 0:
            loss = share * self._distillation(floats, inputs)
        if share < 1:
            tree = pytree.tree_unflatten(floats, self._out_spec)
            with blaming("the task's training_loss cannot judge the network's outputs"):
                loss = loss + (1 - share) * self._task.training_loss(tree, target)
        return loss

    def _distillation(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = self._teacher.apply(self._params, inputs, {})
        if not self._is_kl:
            return squared_loss(outputs, wanted)
        t = self._settings.temperature
        losses = [
            functional.kl_div(
                (y / t).log_softmax(1), (f.float() / t).log_softmax(1), reduction="none",
                log_target=True,
            ).sum(dim=1).mean()
            for y, f in zip(outputs, wanted, strict=True)
        ]  # fmt: skip
        return t * t * torch.stack(losses).sum()
