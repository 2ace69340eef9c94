"""A batch norm given back to a layer into which one was folded."""

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5
MOMENTUM = 0.1


class ChannelNorm(nn.Module):
    """gamma (y - mean) / sqrt(var + eps) + beta per channel; gamma > 0, so that codes survive it.

    beta is the layer's bias and comes with the call. In training mode mean and variance are the
    batch's, else running ones [Ioffe2015].

    Args:
        out_channels: of the layer.

    Attributes:
        log_gamma: (out_channels,) natural logarithm of gamma, parameter.
        mean, var: (out_channels,) running statistics.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.log_gamma = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("mean", torch.zeros(out_channels))
        self.register_buffer("var", torch.ones(out_channels))

    def forward(self, y: Tensor, beta: Tensor, live: Tensor | None) -> Tensor:
        """The normalised `y`, channels in dimension 1; pruned channels are exactly 0.

        Args:
            y: (batch, out_channels, ...).
            beta: (out_channels,), 0 where pruned.
            live: (out_channels,) False where pruned; None where nothing is.
        """
        gamma = self.log_gamma.exp()
        if live is not None:
            gamma = torch.where(live, gamma, 0.0)
        return functional.batch_norm(
            y, self.mean, self.var, gamma, beta, self.training, MOMENTUM, EPS
        )

    def start(self, mean: Tensor, var: Tensor) -> None:
        """Take these statistics, and the gamma under which variances stay as they are."""
        self.restart(mean, var)
        with torch.no_grad():
            self.log_gamma.copy_((self.var + EPS).log() / 2)

    def restart(self, mean: Tensor, var: Tensor) -> None:
        """Take these running statistics."""
        self.mean.copy_(mean)
        self.var.copy_(var)

    def factor(self) -> Tensor:
        """(out_channels,) what running statistics multiply the layer's output by."""
        return self.log_gamma.detach().exp() / (self.var + EPS).sqrt()
