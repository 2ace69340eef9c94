"""The grid on which scales and biases are stored, in torch: what is trained is what is packed."""

import numpy as np
import torch
from torch import Tensor, nn

from quant_ops.stored import BIAS_MAX, TOP_RATIO, StoredScale, ratio_values

_SLACK = 1.016  # how far above the largest stored factor a scale still rounds down to it


class ScaleGrid(nn.Module):
    """The stored scales nearest to wanted ones: a base per bit width times 256 factors.

    The bases are those of the start, doubled as often as the largest scale of a width needs.

    Args:
        bases: (widths,) the float32 base of each bit width present.
        width_of: (out_channels,) position of each channel's width in `bases`, -1 where pruned.
    """

    bases: Tensor
    width_of: Tensor
    index: Tensor
    ratios: Tensor
    middle: Tensor

    def __init__(self, bases: Tensor, width_of: Tensor) -> None:
        super().__init__()
        self.register_buffer("bases", bases.float())
        self.register_buffer("width_of", width_of)
        self.register_buffer("index", width_of.clamp_min(0), persistent=False)
        ratios = torch.from_numpy(ratio_values()).flip(0)
        log_ratios = ratios.double().log()
        self.register_buffer("ratios", ratios, persistent=False)
        middle = (log_ratios[1:] + log_ratios[:-1]) / 2
        self.register_buffer("middle", middle.float(), persistent=False)

    def forward(self, scale: Tensor) -> Tensor:
        """(out_channels, groups) the stored float32 scales nearest to these, in ratio."""
        base = self._bases_for(scale)[self.index][:, None]
        return base * self.ratios[self._positions(scale, base)]

    def rebase(self, scale: Tensor) -> None:
        """Choose the bases anew, such that the largest scale of each width is a stored one."""
        top = self._largest(scale)
        self.bases.copy_(torch.where(top > 0, top * (1 / TOP_RATIO), self.bases))

    def stored(self, scale: Tensor, width: int) -> StoredScale:
        """How the scales of the channels of one width (by position in `bases`) are stored."""
        bases = self._bases_for(scale)
        rows = self.width_of == width
        positions = self._positions(scale, bases[self.index][:, None])[rows]
        ratio = (255 - positions).to(torch.uint8).cpu().numpy()
        return StoredScale(np.float32(bases[width].item()), ratio)

    def _largest(self, scale: Tensor) -> Tensor:
        top = scale.new_zeros(len(self.bases))
        return top.scatter_reduce(0, self.index, scale.amax(dim=1), "amax")

    def _bases_for(self, scale: Tensor) -> Tensor:
        excess = self._largest(scale).double() / (self.bases.double() * TOP_RATIO * _SLACK)
        doublings = excess.log2().ceil().clamp_min(0)
        # exact: a power of two in float64, rounded to float32
        return (self.bases.double() * torch.pow(2.0, doublings)).float()

    def _positions(self, scale: Tensor, base: Tensor) -> Tensor:
        return torch.searchsorted(self.middle, (scale / base).log().contiguous())


def stored_bias(bias: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The grid of stored biases: its float32 base, never below `base`, and codes (out_channels,).

    A bias is stored as base * code with a signed 16-bit code.
    """
    needed = (bias.abs().max().double() / BIAS_MAX).float()
    base = torch.maximum(base, needed)
    codes = (bias.double() / base.double()).round().clamp(-BIAS_MAX, BIAS_MAX)
    return base, codes.float()
