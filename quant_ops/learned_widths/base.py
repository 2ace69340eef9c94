"""One layer's weights at widths that gradients move: what every method has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quant_ops.bit_widths import BIT_WIDTHS

_ROUND_OFF = 1e-6  # a share is kept in float32


@dataclass(frozen=True, slots=True)
class WidthSettings:
    """What every method has a setting for.

    Attributes:
        freeze: share of the training from which on the widths stay as they are.
    """

    freeze: float = 0.8


class LearnedWidths(nn.Module, ABC):
    """Quantizes one layer's weights; rows are output channels, groups of rows share a width.

    In training mode the weights are those of the method's relaxation, noise included. In eval
    mode, and from `Settings.freeze` on, they are those of the discrete choice, `bit_widths()`,
    with straight-through gradients for the weights; `mean_bits()` is then that choice as well.
    Everything that changes is a parameter or a buffer, computed in float32 under autocast too.

    Attributes:
        choices: the widths that the method can choose, ascending; a part of the legal ones.
        learns: whether a size term moves the widths; else they come from elsewhere (`freeze`).
        usual_group: channels that share a width where nobody says how many.
        generator: of the noise; None is torch's default one. Not part of the state.
        share: () of the training that is done.
        chosen: (groups,) the widths in force once they are frozen.
    """

    Settings: ClassVar[type[WidthSettings]] = WidthSettings
    learns: ClassVar[bool] = True
    usual_group: ClassVar[int] = 8
    share: Tensor
    frozen: Tensor
    chosen: Tensor
    group_of: Tensor
    choice_values: Tensor

    @classmethod
    def of(
        cls,
        weight: Tensor,
        *,
        legal: Sequence[float],
        group: int | None = None,
        start: float | Sequence[float] = 8,
        settings: WidthSettings | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """The module for one layer.

        Args:
            weight: (out, n), float; ranges and steps start from its values.
            legal: bit widths that may be chosen.
            group: channels that share a width: None is the whole layer, 1 each channel. The last
                group is smaller where it does not divide.
            start: width to start at, or one per group; the nearest that the method can choose.
            settings: of the method's `Settings`; None is the defaults.
            generator: of the noise.

        Raises:
            ValueError: the weight is not a matrix, a width is not legal, or the numbers of groups
                and starting widths differ.
        """
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(f"wanted a weight (out, n), got shape {tuple(weight.shape)}")
        widths = tuple(sorted(set(legal)))
        if not widths or not set(widths) <= set(BIT_WIDTHS) or max(widths) == 0:
            raise ValueError(f"legal widths {widths} are not some of {BIT_WIDTHS}, one above 0")
        if group is not None and group < 1:
            raise ValueError(f"group is the number of channels that share a width, got {group}")
        out = len(weight)
        group_of = torch.arange(out) // (out if group is None else group)
        n_groups = int(group_of[-1]) + 1
        starts = torch.as_tensor(start, dtype=torch.float32).reshape(-1)
        if starts.numel() not in (1, n_groups):
            raise ValueError(f"{starts.numel()} starting widths for {n_groups} groups")
        choices = cls.choices_among(widths)
        values = torch.tensor(choices, dtype=torch.float32)
        chosen = values[nearest(starts.expand(n_groups).contiguous(), values)]
        module = cls(group_of, choices, chosen, settings or cls.Settings())
        module.generator = generator
        module.start(weight.detach().float().cpu())
        return module.to(weight.device)

    def __init__(
        self,
        group_of: Tensor,
        choices: tuple[float, ...],
        chosen: Tensor,
        settings: WidthSettings,
    ) -> None:
        super().__init__()
        self.choices = choices
        self.settings: Any = settings
        self.generator: torch.Generator | None = None
        self.register_buffer("group_of", group_of)
        self.register_buffer("choice_values", torch.tensor(choices).float(), persistent=False)
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("chosen", chosen)
        self._is_frozen = False  # mirror of `frozen`: a branch on it must not wait for a device
        self.register_load_state_dict_post_hook(_mirror)  # type: ignore[no-untyped-call]

    @classmethod
    def choices_among(cls, legal: tuple[float, ...]) -> tuple[float, ...]:
        """The widths that the method can choose among legal ones (ascending).

        Raises:
            ValueError: there are none.
        """
        return legal

    @abstractmethod
    def start(self, weight: Tensor) -> None:
        """Create the parameters from the weight (out, n) on the CPU; `chosen` is where to start."""

    @abstractmethod
    def soft(self, weight: Tensor) -> Tensor:
        """The relaxation: (out, n) -> (out, n), float32."""

    @abstractmethod
    def hard(self, weight: Tensor, widths: Tensor) -> Tensor:
        """The weights at given widths (out,), each of `choices`: (out, n) -> (out, n), float32."""

    @abstractmethod
    def expected_bits(self) -> Tensor:
        """Expected stored bits per weight of each group (groups,), differentiable."""

    @abstractmethod
    def group_widths(self) -> Tensor:
        """The discrete choice now (groups,), each of `choices`; no gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantized weights (out, n), of the type of `weight`."""
        with in_float32(weight):
            x = weight.float()
            if self.training and not self._is_frozen:
                return self.soft(x).to(weight.dtype)
            out = self.hard(x, self._widths()[self.group_of])
            if self.training:
                # DistributedDataParallel waits for a gradient of every parameter
                out = out + 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
            return out.to(weight.dtype)

    def mean_bits(self) -> Tensor:
        """Expected stored bits per weight of each channel (out,), 0 where it is removed."""
        bits = self.chosen if self._is_frozen else self.expected_bits()
        return bits[self.group_of]

    def live(self) -> Tensor:
        """How much of each channel is there (out,): 0 removed, 1 stored; differentiable.

        Where a method has no probability for it: expected bits over the narrowest width, at most 1.
        """
        return (self.mean_bits() / min(w for w in self.choices if w)).clamp(0, 1)

    def bit_widths(self) -> tuple[float, ...]:
        """The discrete choice now, one of `choices` per channel (out,)."""
        index = nearest(self._widths(), self.choice_values)[self.group_of]
        return tuple(self.choices[at] for at in index.tolist())

    def progress(self, share: float) -> None:
        """Say how much of the training is done, 0..1: temperatures follow, widths freeze."""
        self.share.fill_(share)
        if share + _ROUND_OFF < self.settings.freeze:
            self.frozen.fill_(False)
        elif not self._is_frozen:
            self.chosen.copy_(self.group_widths())
            self.frozen.fill_(True)
        self._is_frozen = share + _ROUND_OFF >= self.settings.freeze

    def freeze(self, widths: Sequence[float]) -> None:
        """From now on the widths are these, one per channel, equal within each group.

        Raises:
            ValueError: a width is none of `choices`, or channels of one group differ.
        """
        if len(widths) != len(self.group_of) or not set(widths) <= set(self.choices):
            raise ValueError(
                f"wanted {len(self.group_of)} widths of {self.choices}, got {tuple(widths)}"
            )
        given = self.chosen.new_tensor(list(widths))
        self.chosen[self.group_of] = given
        if not torch.equal(self.chosen[self.group_of], given):
            raise ValueError(f"channels of one group have different widths: {tuple(widths)}")
        self.frozen.fill_(True)
        self._is_frozen = True

    def penalty(self) -> Tensor:
        """The method's own regulariser beside the size, ()."""
        return self.share.new_zeros(())

    def _widths(self) -> Tensor:
        return self.chosen if self._is_frozen else self.group_widths()

    @property
    def n_groups(self) -> int:
        """Number of groups of channels."""
        return int(self.chosen.numel())


def in_float32(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x`."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def nearest(values: Tensor, choices: Tensor) -> Tensor:
    """Position of the nearest choice for each value; of two as near, the smaller.

    >>> nearest(torch.tensor([0.4, 1.7, 3.0, 9.0]), torch.tensor([0.0, 2.0, 4.0])).tolist()
    [0, 1, 1, 2]
    """
    return (values[:, None] - choices).abs().argmin(dim=1)


class _Bounded(torch.autograd.Function):
    """Clamps, and passes every gradient but those that lead further out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.ends
        (gradient,) = gradients
        outward = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """`x` within [low, high], such that descent can bring back what has left the interval."""
    out: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return out


def _mirror(module: nn.Module, _: Any) -> None:
    assert isinstance(module, LearnedWidths)
    module._is_frozen = bool(module.frozen)
