"""Fake quantization of rows at widths of their own, with steps that gradients move."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant_ops.learned_widths.base import straight_through
from quant_ops.quantized import code_range
from quant_ops.quantizers import effective_scheme, levels_of, squared_errors
from quant_ops.ranges import weight_scales


class StepGrids(nn.Module):
    """A learned step for every row at every width, and whether its levels include 0.

    Steps start at the least squared error; the offset of half a step is decided once, per width,
    by the smaller error of the two, as the packed file's "auto" scheme does. Steps are kept as
    logarithms, so that they stay positive [Esser2020].

    Attributes:
        log_step: (rows, widths) natural logarithms, one column per width above 0.
    """

    low: Tensor
    high: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, choices: Sequence[float]) -> None:
        super().__init__()
        columns, offsets = [], []
        for width in choices:
            scheme, step = best_grid(weight, width)
            columns.append(step)
            offsets.append(scheme == "mid_rise")
        ranges = [code_range(w, effective_scheme(w, "mid_tread")) if w else (0, 0) for w in choices]
        self._has_zero = choices[0] == 0
        self.log_step = nn.Parameter(torch.stack(columns[self._has_zero :], dim=1).log())
        self.register_buffer("low", torch.tensor([float(low) for low, _ in ranges]))
        self.register_buffer("high", torch.tensor([float(high) for _, high in ranges]))
        self.register_buffer("offset", torch.tensor([0.5 * o for o in offsets]))

    def quantize(self, weight: Tensor, index: Tensor) -> Tensor:
        """Nearest levels (rows, n) with row i at the width of number index[i]."""
        step = self.steps(index)
        low, high, offset = (x[index][:, None] for x in (self.low, self.high, self.offset))
        return fake_quantize_rows(weight, step, low, high, offset)

    def steps(self, index: Tensor) -> Tensor:
        """(rows, 1) steps of the rows at the widths of these numbers; 1 where a width is 0."""
        column = (index - int(self._has_zero)).clamp_min(0)[:, None]
        step = self.log_step.gather(1, column).exp()
        return torch.where(index[:, None] >= int(self._has_zero), step, 1.0)


def fake_quantize_rows(
    weight: Tensor, step: Tensor, low: Tensor, high: Tensor, offset: Tensor
) -> Tensor:
    """step * (clamp(round(w / step - offset), low, high) + offset), straight through.

    Gradients pass to the weight inside the range, and to the step as in [Esser2020]: the code
    minus w / step inside, the code outside. Levels offset by half a step pass half a step more,
    or most binary weights would have no gradient.

    Args:
        weight: (rows, n).
        step: (rows, 1), positive.
        low: smallest codes, broadcastable.
        high: largest codes, broadcastable.
        offset: of the levels, broadcastable: 0 or 1/2.
    """
    ratio = weight / step
    inside = torch.minimum(torch.maximum(ratio, low), high + 2 * offset)
    codes = (ratio.detach() - offset).round()
    levels = torch.minimum(torch.maximum(codes, low), high) + offset
    return straight_through(levels, inside) * step


def best_grid(
    weight: Tensor, width: float, schemes: Sequence[str] = ("mid_tread", "mid_rise")
) -> tuple[str, Tensor]:
    """The scheme of the smaller squared error, and its steps (rows,), all positive.

    Args:
        weight: (rows, n) float32 on the CPU.
        width: a legal width; 0 gives steps of 1.
        schemes: what to choose from.
    """
    if width == 0:
        return "mid_tread", torch.ones(len(weight))
    found = []
    for scheme in dict.fromkeys(effective_scheme(width, scheme) for scheme in schemes):
        levels = levels_of(width, scheme)
        step = torch.from_numpy(weight_scales(weight, width, levels).values.copy())
        error = float(squared_errors(weight, step[None].double(), levels).sum())
        found.append((error, scheme, step))
    _, scheme, step = min(found, key=lambda item: item[0])
    return scheme, step
