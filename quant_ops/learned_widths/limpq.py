"""LIMPQ: learned step sizes at every width tell how sensitive a layer is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_ops.learned_widths.base import LearnedWidths, WidthSettings, nearest
from quant_ops.learned_widths.grids import StepGrids

OUTLIER = 1e8  # importance of a width whose step came out smaller than that of the next wider one


@dataclass(frozen=True, slots=True)
class LIMPQSettings(WidthSettings):
    """Settings of `LIMPQ`: those of every method."""

    freeze: float = 1.0


class LIMPQ(LearnedWidths):
    """Trains the steps of all widths in one run; `importance` feeds an integer program [Tang2022].

    A training loop runs forward and backward once at every width (`select(width)`) and once at a
    random policy (`select(None)`), then takes one optimizer step; at the end the steps are the
    importance of the widths: the larger, the more is lost. No gradient moves the widths; those an
    integer program chooses are set with `freeze`.

    From the paper: the joint training, steps as importance, the mark for outliers.

    Differs: steps are per channel, as files store them, and a layer's or group's importance is
    their mean; logarithms are learned, without the gradient scale of [Esser2020]. 0 is not a
    choice, a removed layer has no step.
    """

    Settings = LIMPQSettings
    learns = False

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """All but 0."""
        return tuple(w for w in legal if w)

    def start(self, weight: Tensor) -> None:
        """Steps of least squared error at every width; a random policy."""
        self.grids = StepGrids(weight, self.choices)
        self._selected: float | None = None

    def select(self, width: float | None) -> None:
        """The width of all channels in training mode; None draws one per group at every pass.

        Raises:
            ValueError: the width is none of `choices`.
        """
        if width is not None and width not in self.choices:
            raise ValueError(f"{width} is not one of {self.choices}")
        self._selected = width

    def soft(self, weight: Tensor) -> Tensor:
        """The weights at the selected width."""
        if self._selected is None:
            drawn = torch.randint(len(self.choices), (self.n_groups,), generator=self.generator,
                                  device=weight.device)  # fmt: skip
            return self.grids.quantize(weight, drawn[self.group_of])
        at = self.choices.index(self._selected)
        return self.grids.quantize(weight, torch.full_like(self.group_of, at))

    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The quantizer of each row's width."""
        return self.grids.quantize(weight, nearest(widths, self.choice_values))

    def expected_bits(self) -> Tensor:
        """The widths that were set; no gradient."""
        return self.chosen

    def group_widths(self) -> Tensor:
        """The widths that were set, the starting ones at first."""
        return self.chosen

    def importance(self) -> Tensor:
        """(widths,) of the whole layer, in the order of `choices`."""
        return _marked(self.grids.log_step.detach().exp().mean(dim=0, keepdim=True))[0]

    def group_importance(self) -> Tensor:
        """(groups, widths), in the order of `choices`."""
        steps = self.grids.log_step.detach().exp()
        total = steps.new_zeros(self.n_groups, steps.shape[1]).index_add(0, self.group_of, steps)
        return _marked(total / torch.bincount(self.group_of)[:, None])


def _marked(steps: Tensor) -> Tensor:
    smaller = steps[:, :-1] < steps[:, 1:]
    return torch.cat([steps[:, :-1].masked_fill(smaller, OUTLIER), steps[:, -1:]], dim=1)
