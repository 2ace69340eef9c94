"""Quantizers with learned widths: one module per tensor that is quantized."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, distributed, nn

from quant_ops.hgq.fixed_point import Arithmetic, fixed_point, rounded, through, train_fixed_point

_EPSILON = 1e-7  # keeps log2 finite where every value is 0
_NO_INTEGER_BITS = 32.0  # of a group with no bits at all: every value rounds to 0
GRANULARITIES = ("element", "channel", "tensor")


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """How a tensor is quantized at the start, and what is learned.

    Attributes:
        form: "kif" learns integer and fraction bits, "kbi" integer bits and their sum.
        signed: whether negative values are kept.
        integer_bits, fraction_bits: initial, without the sign.
        arithmetic: rounding and overflow; with WRAP integer bits follow the data instead of a
            gradient.
        granularity: "element", "channel" or "tensor": which values share their bits.
        integer_decay: WRAP only: by how much integer bits may fall per training step.
        most_bits: upper limit of the sum (kbi) or of the fraction bits (kif).
    """

    form: str = "kif"
    signed: bool = True
    integer_bits: float = 2.0
    fraction_bits: float = 6.0
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    granularity: str = "element"
    integer_decay: float = 0.01
    most_bits: float = 24.0

    def __post_init__(self) -> None:
        if self.form not in ("kif", "kbi"):
            raise ValueError(f"form {self.form!r} is not known; use 'kif' or 'kbi'")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity {self.granularity!r} is not one of {', '.join(GRANULARITIES)}"
            )
        if self.integer_bits + self.fraction_bits < 0:
            raise ValueError(
                f"{self.integer_bits:g} integer and {self.fraction_bits:g} fraction bits are "
                "less than none; make their sum 0 or more"
            )

    def make(self, shape: Sequence[int], *, is_weight: bool = False) -> "FixedPointQuantizer":
        """A quantizer whose bits have `shape`, which must broadcast to the data."""
        kind = KIFQuantizer if self.form == "kif" else KBIQuantizer
        return kind(shape, self, is_weight=is_weight)


WEIGHTS = QuantizerSpec(
    "kbi", arithmetic=Arithmetic(overflow="SAT_SYM"), integer_decay=math.inf, most_bits=23.0
)
ACTIVATIONS = QuantizerSpec("kif")
BIASES = QuantizerSpec("kbi")


class FixedPointQuantizer(nn.Module):
    """Fixed point with learned widths [Sun2024], as HGQ2 0.2.0 does it.

    The shape of the bit tensors decides the granularity: size 1 along an axis shares. In training
    mode gradients reach data and bits; in evaluation mode the result is what hardware computes.
    Integer bits of WRAP follow the largest value seen, since no gradient reaches them.

    Args:
        shape: of the bit tensors.
        spec: initial bits and modes.
        is_weight: the data are parameters: WRAP need not wrap, as their range is known.
    """

    learns_total: ClassVar[bool]  # other_bits() are the sum of integer and fraction bits
    integer_bits: Tensor
    signed: Tensor

    def __init__(
        self, shape: Sequence[int], spec: QuantizerSpec, *, is_weight: bool = False
    ) -> None:
        super().__init__()
        self.arithmetic, self.is_weight = spec.arithmetic, is_weight
        self.integer_decay, self.most_bits = spec.integer_decay, spec.most_bits
        self.tracing = False
        self.register_buffer("signed", torch.full(tuple(shape), float(spec.signed)))
        integer_bits = torch.full(tuple(shape), float(spec.integer_bits))
        if self.follows_range:
            self.register_buffer("integer_bits", integer_bits)
        else:
            self.integer_bits = nn.Parameter(integer_bits)

    @property
    def follows_range(self) -> bool:
        """Whether integer bits are set by the data."""
        return self.arithmetic.overflow == "WRAP"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the bit tensors."""
        return tuple(self.integer_bits.shape)

    @abstractmethod
    def whole_bits(self) -> tuple[Tensor, Tensor]:
        """Integer and fraction bits as used: whole numbers, gradients straight through."""

    @abstractmethod
    def magnitude_bits(self) -> Tensor:
        """Digits of a value without its sign, whole, >= 0; differentiable."""

    @abstractmethod
    def charged_bits(self) -> list[Tensor]:
        """The learned bits, not rounded, on whose sum gamma is charged."""

    @abstractmethod
    def constrain(self) -> None:
        """Bring the learned bits back into their limits."""

    @abstractmethod
    def other_bits(self) -> nn.Parameter:
        """The learned tensor besides the integer bits: fraction bits, or the sum of both."""

    @abstractmethod
    def _needed_integer_bits(self, x: Tensor) -> Tensor:
        """Integer bits that x needs, a group of values at a time."""

    def bit_widths(self) -> Tensor:
        """Width of each group's values in EBOPs: the sign counts in SAT alone."""
        bits = self.magnitude_bits()
        return bits + self.signed if self.arithmetic.counts_sign else bits

    def forward(self, x: Tensor) -> Tensor:
        """x: of a shape that the bits broadcast to; the result has it too, float32."""
        x = x.float()
        if self.training:
            with torch.no_grad():
                self.constrain()
        if self.follows_range and (self.training or self.tracing):
            return self._followed(x)
        if self.training:
            return self._trained(x)
        integer_bits, fraction_bits = self.whole_bits()
        if self.follows_range and self.is_weight and self._skips_wrap():
            return rounded(x, fraction_bits, self.arithmetic)
        return fixed_point(x, self.signed, integer_bits, fraction_bits, self.arithmetic)

    def _skips_wrap(self) -> bool:
        return True

    def _trained(self, x: Tensor) -> Tensor:
        return train_fixed_point(
            x,
            self.signed,
            self.integer_bits,
            self.other_bits(),
            self.arithmetic,
            other_is_total=self.learns_total,
        )

    def _followed(self, x: Tensor) -> Tensor:
        """WRAP while the range is being learned: rounded, not wrapped."""
        if self.learns_total:  # what is left for the fraction depends on the range: that first
            self._follow(x)
        y = self._trained(x)
        if not self.learns_total:
            self._follow(y)
        if not self.training:
            self._follow_sign(y)
        return y

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        largest = self._largest(x)
        if self.training and not self.is_weight:
            largest = over_processes(largest)
        needed = self._needed_integer_bits(largest)
        if self.training:
            self.integer_bits.copy_(torch.maximum(self.integer_bits - self.integer_decay, needed))
        else:
            self.integer_bits.copy_(torch.maximum(torch.round(self.integer_bits), needed))

    @torch.no_grad()
    def _follow_sign(self, y: Tensor) -> None:
        is_negative = self._largest(-y, absolute=False) > 0
        self.signed.copy_(torch.maximum(self.signed, is_negative.to(self.signed.dtype)))

    def _largest(self, x: Tensor, *, absolute: bool = True) -> Tensor:
        """Largest (absolute) value of each group, in the shape of the bits."""
        shape = (1,) * (x.dim() - len(self.shape)) + self.shape
        shared = [a for a, size in enumerate(shape) if size == 1 and x.shape[a] != 1]
        if absolute:
            x = x.abs()
        return (x.amax(dim=shared, keepdim=True) if shared else x).reshape(self.shape)

    def reset_range(self) -> None:
        """Forget the range and the signs, before `trace_ranges`; nothing to do but for WRAP."""
        if self.follows_range:
            self.integer_bits.fill_(-1e9)
            self.signed.zero_()

    @torch.no_grad()
    def fit_range(self, x: Tensor) -> None:
        """Set the integer bits such that the values of x fit, the step kept as it is."""
        _, fraction_bits = self.whole_bits()
        needed = torch.ceil(torch.log2(self._largest(x) + torch.exp2(-fraction_bits)))
        self._set_bits(torch.maximum(needed, -fraction_bits), fraction_bits)

    @torch.no_grad()
    def raise_from_zero(self, x: Tensor) -> int:
        """Add fraction bits until some value of x is not rounded to 0; returns how many.

        Where everything is 0 the next layer sees a constant and no gradient passes.
        """
        integer_bits, fraction_bits = self.whole_bits()
        top = float(x.abs().amax()) if x.numel() else 0.0
        if not top > 0:
            return 0
        for added in range(32):
            bits = integer_bits, fraction_bits + added
            if fixed_point(x.float(), self.signed, *bits, self.arithmetic).any():
                self._set_bits(*bits)
                return added
        return 0

    @abstractmethod
    def _set_bits(self, integer_bits: Tensor, fraction_bits: Tensor) -> None:
        """Overwrite the bits by whole ones."""

    def extra_repr(self) -> str:
        """Shape and modes."""
        return f"{list(self.shape)}, {self.arithmetic.rounding}, {self.arithmetic.overflow}"


def over_processes(largest: Tensor) -> Tensor:
    """The largest over all processes that train together, each on its part of the data."""
    if distributed.is_available() and distributed.is_initialized():
        largest = largest.contiguous()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


class KIFQuantizer(FixedPointQuantizer):
    """Learns integer and fraction bits: for data."""

    learns_total: ClassVar[bool] = False

    def __init__(
        self,
        shape: Sequence[int],
        spec: QuantizerSpec = ACTIVATIONS,
        *,
        is_weight: bool = False,
    ) -> None:
        super().__init__(shape, spec, is_weight=is_weight)
        self.fraction_bits = nn.Parameter(torch.full(tuple(shape), float(spec.fraction_bits)))

    def whole_bits(self) -> tuple[Tensor, Tensor]:
        return through(self.integer_bits), through(self.fraction_bits)

    def magnitude_bits(self) -> Tensor:
        return torch.relu(through(self.integer_bits) + through(self.fraction_bits))

    def charged_bits(self) -> list[Tensor]:
        return [self.fraction_bits, *([] if self.follows_range else [self.integer_bits])]

    def constrain(self) -> None:
        limit = self.most_bits
        self.fraction_bits.clamp_(-limit, limit)
        if not self.follows_range:
            self.integer_bits.clamp_(1 - limit, limit - 1)

    def other_bits(self) -> nn.Parameter:
        return self.fraction_bits

    def _needed_integer_bits(self, x: Tensor) -> Tensor:
        needed = torch.ceil(torch.log2(x + torch.exp2(-torch.round(self.fraction_bits))))
        limit = self.most_bits - 1
        return needed if self.training else needed.clamp(-limit, limit)

    def _set_bits(self, integer_bits: Tensor, fraction_bits: Tensor) -> None:
        self.integer_bits.copy_(integer_bits)
        self.fraction_bits.copy_(fraction_bits)


class KBIQuantizer(FixedPointQuantizer):
    """Learns integer bits and their sum with the fraction bits: for weights."""

    learns_total: ClassVar[bool] = True

    def __init__(
        self, shape: Sequence[int], spec: QuantizerSpec = WEIGHTS, *, is_weight: bool = True
    ) -> None:
        super().__init__(shape, spec, is_weight=is_weight)
        total = float(spec.integer_bits + spec.fraction_bits)
        self.total_bits = nn.Parameter(torch.full(tuple(shape), total))

    def whole_bits(self) -> tuple[Tensor, Tensor]:
        integer_bits = through(self.integer_bits)
        return integer_bits, through(self.total_bits) - integer_bits

    def magnitude_bits(self) -> Tensor:
        return through(self.total_bits)

    def charged_bits(self) -> list[Tensor]:
        return [self.total_bits]

    def constrain(self) -> None:
        self.total_bits.clamp_(0, self.most_bits)

    def other_bits(self) -> nn.Parameter:
        return self.total_bits

    def _skips_wrap(self) -> bool:
        return self.arithmetic.rounding == "RND"

    def _needed_integer_bits(self, x: Tensor) -> Tensor:
        bits = torch.round(self.total_bits)
        needed = torch.ceil(torch.log2((x + _EPSILON) / (1 - torch.exp2(-bits) + _EPSILON)))
        return torch.where(bits > 0, needed, torch.full_like(needed, _NO_INTEGER_BITS))

    def _set_bits(self, integer_bits: Tensor, fraction_bits: Tensor) -> None:
        self.integer_bits.copy_(integer_bits)
        self.total_bits.copy_(integer_bits + fraction_bits)
