"""Steers an expected size to a target by the end of a training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LARGEST_ERROR = 1.0  # natural logarithm: further off does not push harder


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """Settings of `SizeController`.

    Attributes:
        by: share of the training at which the target is to be reached.
        first: multiplier at the start: what a file larger by the target's size costs, in loss.
        integral: change of the multiplier's logarithm per unit of error and whole training.
        proportional: change of its logarithm per unit of error.
        lead: share of the training by which the error is foreseen, from how it changes: widths
            follow the multiplier late, and without foresight it would grow far too large.
    """

    by: float = 0.6
    first: float = 0.01
    integral: float = 100.0
    proportional: float = 2.0
    lead: float = 0.05


class SizeController(nn.Module):
    """A Lagrange multiplier with a proportional and an integral part, both in logarithms.

    The error is ln(size / wanted), where the wanted size falls from the first one seen to the
    target along a straight line of logarithms, and stays there. Logarithms make one setting serve
    losses and sizes of any scale, and the multiplier positive. Its state is in buffers.

    Args:
        target_bytes: where the size is to end.
        settings: see `ControllerSettings`.
    """

    log_multiplier: Tensor
    last_share: Tensor
    first_bytes: Tensor
    slow_error: Tensor

    def __init__(self, target_bytes: float, settings: ControllerSettings | None = None) -> None:
        super().__init__()
        if not target_bytes > 0:
            raise ValueError(f"the target must be a positive number of bytes, got {target_bytes}")
        self.target_bytes = float(target_bytes)
        self.settings = settings or ControllerSettings()
        self.register_buffer("log_multiplier", torch.tensor(math.log(self.settings.first)))
        self.register_buffer("last_share", torch.zeros(()))
        self.register_buffer("first_bytes", torch.zeros(()))
        self.register_buffer("slow_error", torch.zeros(()))

    def forward(self, expected_bytes: Tensor, share: float) -> Tensor:
        """The term to add to the loss, (): multiplier x size / target. Moves the multiplier.

        Args:
            expected_bytes: differentiable, ().
            share: of the training that is done, 0..1; only steps forward move the integral part.
        """
        size = expected_bytes.detach().float()
        if self.training:
            self.first_bytes.copy_(torch.where(self.first_bytes > 0, self.first_bytes, size))
        error = (size.clamp_min(1e-9) / self.wanted(share)).log()
        step = (share - self.last_share).clamp_min(0)
        if self.training and self.settings.lead > 0:
            part = 1 - torch.exp(-step / self.settings.lead)
            self.slow_error.add_(part * (error - self.slow_error))
            error = 2 * error - self.slow_error
        error = error.clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
        if self.training:
            self.log_multiplier.add_(self.settings.integral * step * error)
            self.last_share.fill_(share)
        multiplier = (self.log_multiplier + self.settings.proportional * error).exp()
        return multiplier * expected_bytes / self.target_bytes

    def wanted(self, share: float) -> Tensor:
        """The size wanted at this share of the training, ()."""
        place = min(share / self.settings.by, 1.0) if self.settings.by > 0 else 1.0
        first = self.first_bytes.clamp_min(1e-9)
        wanted: Tensor = torch.pow(first, 1 - place) * self.target_bytes**place
        return wanted

    @property
    def multiplier(self) -> float:
        """The integral part: the price of the target's size, in loss."""
        return float(self.log_multiplier.exp())
