"""Weights that swing to and fro between two codes: damped, and frozen where they go on."""

import torch
from torch import Tensor, nn

from quant_ops.qat.layer import TrainedLayer
from quant_ops.qat.weights import LearnedStep


class Oscillations(nn.Module):
    """Counts direction changes of codes and freezes weights that change too often [Nagel2022].

    A code oscillates when it moves against its last move. The frequency is a moving average; a
    weight whose frequency passes the threshold stays at the nearest code to its mean for good.

    Args:
        trained: the layer; its steps are learned.
        momentum: of the moving averages: the share of the newest step.
    """

    last_codes: Tensor
    last_move: Tensor
    frequency: Tensor
    mean_code: Tensor
    frozen: Tensor

    def __init__(self, trained: TrainedLayer, momentum: float = 0.01) -> None:
        super().__init__()
        quantizer = trained.quantizer
        assert isinstance(quantizer, LearnedStep)
        self._momentum = momentum
        codes = quantizer.codes(trained.real_weights().detach())
        self.register_buffer("last_codes", codes)
        self.register_buffer("last_move", torch.zeros_like(codes))
        self.register_buffer("frequency", torch.zeros_like(codes))
        self.register_buffer("mean_code", codes.clone())
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, trained: TrainedLayer, threshold: float) -> None:
        """Look at the codes after a step of the optimizer, then hold frozen weights at theirs.

        Args:
            trained: the layer that was given at the start.
            threshold: frequency from which a weight is frozen; 1 or more freezes none.
        """
        quantizer = trained.quantizer
        assert isinstance(quantizer, LearnedStep)
        codes = quantizer.codes(trained.real_weights())
        move = (codes - self.last_codes).sign()
        against = move * self.last_move < 0
        self.frequency.lerp_(against.float(), self._momentum)
        followed = self.mean_code.lerp(codes, self._momentum)
        self.mean_code.copy_(torch.where(self.frozen, self.mean_code, followed))
        self.last_move.copy_(torch.where(move != 0, move, self.last_move))
        if threshold < 1:
            self.frozen |= self.frequency > threshold
            self._hold(trained, quantizer)
            codes = torch.where(self.frozen, self.mean_code.round(), codes)
        self.last_codes.copy_(codes)

    def _hold(self, trained: TrainedLayer, quantizer: LearnedStep) -> None:
        if bool(self.frozen.any()):
            step = quantizer.log_step.exp().reshape(-1, 1)
            centers = quantizer.rows(self.mean_code.round()) + quantizer.per_row(quantizer.offset)
            values = (centers * step).reshape(trained.latent.shape) / trained.unit
            trained.latent.copy_(torch.where(self.frozen, values, trained.latent))


def dampening(trained: TrainedLayer) -> Tensor:
    """Sum of squared distances, in steps, of weights from their levels; () [Nagel2022, eq. 4].

    Weights outside the range count nothing; gradients reach the latent weights alone.
    """
    quantizer = trained.quantizer
    assert isinstance(quantizer, LearnedStep)
    weights = trained.real_weights()
    rows = quantizer.rows(weights)
    step = quantizer.log_step.detach().exp().reshape(-1, 1)
    offset, low, high = (
        quantizer.per_row(x) for x in (quantizer.offset, quantizer.low, quantizer.high)
    )
    levels = quantizer.rows(quantizer.codes(weights.detach())) + offset
    inside = torch.minimum(torch.maximum(rows / step, low + offset), high + offset)
    return (levels - inside).square().sum()
