"""Hard-concrete gates: random numbers that are exactly 0 or 1 with a probability to learn."""

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
STRETCH = (-0.1, 1.1)
CLOSED_BELOW = 0.34  # a gate is open if the probability of 0 is less
_LOG_ODDS_OF_ZERO = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])


def sample(phi: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = clamp(1.2 sigmoid((logit(u) + phi) / t) - 0.1, 0, 1), u uniform [Louizos2018].

    phi: any shape; gradients pass where 0 < z < 1.
    """
    tiny = torch.finfo(phi.dtype).eps
    uniform = torch.rand(phi.shape, generator=generator, device=phi.device, dtype=phi.dtype)
    noise = torch.logit(uniform.clamp(tiny, 1 - tiny))
    low, high = STRETCH
    return (torch.sigmoid((noise + phi) / TEMPERATURE) * (high - low) + low).clamp(0, 1)


def open_probability(phi: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(phi - t ln(0.1 / 1.1))."""
    return torch.sigmoid(phi - _LOG_ODDS_OF_ZERO)


def is_open(phi: Tensor) -> Tensor:
    """Whether the gate stays in the network that is stored."""
    return 1 - open_probability(phi.detach()) < CLOSED_BELOW
