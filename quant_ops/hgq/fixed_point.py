"""Fixed-point arithmetic: value = code * 2^-fraction_bits, with a rounding and an overflow mode.

A number has a sign or not, integer bits and fraction bits; both may be negative. Its magnitude has
integer_bits + fraction_bits digits. Powers of two are exact, so every result is a dyadic number.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

LN2 = math.log(2)


def _half_to_zero(x: Tensor) -> Tensor:
    return torch.ceil(x.abs() - 0.5) * torch.sign(x)


def _half_from_zero(x: Tensor) -> Tensor:
    return torch.floor(x.abs() + 0.5) * torch.sign(x)


ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "TRN": torch.floor,
    "TRN_ZERO": torch.trunc,
    "RND": lambda x: torch.floor(x + 0.5),
    "RND_CONV": torch.round,  # halves to even
    "RND_ZERO": _half_to_zero,
    "RND_INF": _half_from_zero,
    "RND_MIN_INF": lambda x: torch.ceil(x - 0.5),
}
OVERFLOWS = ("WRAP", "SAT", "SAT_SYM", "WRAP_SM")
_WITH_WRAP_SM = ("RND", "RND_CONV")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How values become codes.

    Attributes:
        rounding: a key of `ROUNDINGS`. "S_" before it is accepted and changes nothing, as in
            HGQ2 0.2.0, whose stochastic modes draw no noise.
        overflow: WRAP (modulo), SAT (saturate, -2^i included), SAT_SYM (saturate, symmetric) or
            WRAP_SM (modulo with reflection; with RND and RND_CONV only).
    """

    rounding: str = "RND"
    overflow: str = "WRAP"

    def __post_init__(self) -> None:
        rounding = self.rounding.upper().removeprefix("S_")
        overflow = self.overflow.upper()
        if rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding {self.rounding!r} is not known; use one of {', '.join(ROUNDINGS)}"
            )
        if overflow not in OVERFLOWS:
            raise ValueError(
                f"overflow {self.overflow!r} is not known; use one of {', '.join(OVERFLOWS)}"
            )
        if overflow == "WRAP_SM" and rounding not in _WITH_WRAP_SM:
            raise ValueError(
                f"overflow WRAP_SM goes with rounding {' or '.join(_WITH_WRAP_SM)}, "
                f"not {rounding}; change one of the two"
            )
        object.__setattr__(self, "rounding", rounding)
        object.__setattr__(self, "overflow", overflow)

    @property
    def saturates(self) -> bool:
        """Whether values outside the range become its ends."""
        return self.overflow in ("SAT", "SAT_SYM")

    @property
    def counts_sign(self) -> bool:
        """Whether the sign adds one to the width of a value in EBOPs; true of SAT alone."""
        return self.overflow == "SAT"


def fixed_point(
    x: Tensor, signed: Tensor, integer_bits: Tensor, fraction_bits: Tensor, arithmetic: Arithmetic
) -> Tensor:
    """The fixed-point number that stands for each x in inference; 0 where no bit is left.

    Gradients pass straight through the rounding. Agrees with HGQ2 0.2.0 to the bit.

    Args:
        x: any shape, float32.
        signed: 0 or 1, broadcastable to x.
        integer_bits: whole numbers, float32, broadcastable to x.
        fraction_bits: like integer_bits.
        arithmetic: rounding and overflow.
    """
    integers = torch.maximum(integer_bits, -fraction_bits).detach()
    integers = integers + (integer_bits - integer_bits.detach())
    if arithmetic.overflow == "WRAP_SM":
        y = _reflected(x, signed, integers, fraction_bits, arithmetic)
    else:
        if arithmetic.saturates:
            x = _saturated(x, signed, integers, fraction_bits, arithmetic)
        y = rounded(x, fraction_bits, arithmetic)
        if arithmetic.overflow == "WRAP":
            y = _wrapped(y, signed, integers)
    return torch.where(signed + integer_bits + fraction_bits > 0, y, torch.zeros_like(y))


def rounded(x: Tensor, fraction_bits: Tensor, arithmetic: Arithmetic) -> Tensor:
    """The nearest multiple of 2^-fraction_bits in the sense of the rounding mode."""
    scale = torch.exp2(fraction_bits)
    scaled = x * scale
    nearest = ROUNDINGS[arithmetic.rounding](scaled).detach()
    return (nearest + (scaled - scaled.detach())) / scale


def _saturated(
    x: Tensor, signed: Tensor, integers: Tensor, fraction_bits: Tensor, arithmetic: Arithmetic
) -> Tensor:
    top = torch.exp2(integers)
    high = top - torch.exp2(-fraction_bits)
    low = -signed * (high if arithmetic.overflow == "SAT_SYM" else top)
    return torch.where(x > high, high, torch.where(x < low, low, x))


def _wrapped(y: Tensor, signed: Tensor, integers: Tensor) -> Tensor:
    span = integers + signed
    shift = signed * torch.exp2(span - 1)
    return (y + shift) % torch.exp2(span) - shift


def _reflected(
    x: Tensor, signed: Tensor, integers: Tensor, fraction_bits: Tensor, arithmetic: Arithmetic
) -> Tensor:
    step = torch.exp2(-fraction_bits)
    high = torch.exp2(integers) - step
    low = -(high + step) * signed
    span = torch.exp2(integers + signed)
    is_odd_turn = ((x / span) % 2 >= 1) & (x.abs() > step / 2)
    is_upper_half = ((x + step / 2) / (span / 2)) % 2 >= 1
    y = ((rounded(x, fraction_bits, arithmetic) - high - step) % span) + low
    y = torch.where(is_upper_half, -y - step, y)
    return torch.where(is_odd_turn, -y - step, y)


def train_fixed_point(
    x: Tensor,
    signed: Tensor,
    integer_bits: Tensor,
    other_bits: Tensor,
    arithmetic: Arithmetic,
    *,
    other_is_total: bool,
) -> Tensor:
    """What a training step computes, with gradients for x and for the real-valued bits.

    With q(x) the result and e = x - q(x): dq/dx = 1 and dq/dfraction_bits = ln2 * e; where x is
    clipped dq/dx = 0 and the bits get the gradient of the end that they set [Sun2024]. WRAP does
    not wrap here.

    Args:
        x: any shape, float32.
        signed: 0 or 1, broadcastable to x.
        integer_bits: real, broadcastable to x; rounded inside, straight through.
        other_bits: like integer_bits: fraction bits, or the sum of both.
        arithmetic: rounding and overflow.
        other_is_total: whether other_bits are the sum.
    """
    if arithmetic.overflow == "WRAP_SM":
        integers = through(integer_bits)
        fractions = through(other_bits) - integers if other_is_total else through(other_bits)
        above = torch.maximum(integers, -fractions).detach() + (integers - integers.detach())
        return _reflected(x, signed, above, fractions, arithmetic)
    y = Trained.apply(x, signed, integer_bits, other_bits, arithmetic, other_is_total)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


def through(bits: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    return cast(Tensor, _Through.apply(bits))  # type: ignore[no-untyped-call]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bits: Tensor) -> Tensor:
        return torch.round(bits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Trained(torch.autograd.Function):
    """One node of the autograd graph instead of twenty."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        signed: Tensor,
        integer_bits: Tensor,
        other_bits: Tensor,
        arithmetic: Arithmetic,
        other_is_total: bool,
    ) -> Tensor:
        fractions = torch.round(other_bits)
        if other_is_total:
            fractions = fractions - torch.round(integer_bits)
        scale = torch.exp2(fractions)
        clipped = x
        ends: tuple[Tensor, ...] = ()
        if arithmetic.saturates:
            top = torch.exp2(torch.maximum(torch.round(integer_bits), -fractions))
            high = top - 1 / scale
            low = -signed * (high if arithmetic.overflow == "SAT_SYM" else top)
            clipped = torch.minimum(torch.maximum(x, low), high)
            outside = torch.maximum(torch.sign(x - clipped), -signed)
            ends = (outside, x == clipped, scale, top)
        y = ROUNDINGS[arithmetic.rounding](clipped * scale).div_(scale)
        ctx.save_for_backward(clipped - y, *ends)
        ctx.shapes = integer_bits.shape, other_bits.shape
        ctx.arithmetic, ctx.other_is_total = arithmetic, other_is_total
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        error, *ends = ctx.saved_tensors
        to_fraction = error * g
        g_x, to_integer = g, None
        if ctx.arithmetic.saturates:
            outside, is_inside, scale, top = ends
            at_ends = g * outside  # 1 above, -1 below, 0 inside and below an unsigned range
            g_x = g * is_inside
            to_integer = at_ends * top
            if ctx.arithmetic.overflow == "SAT":
                at_ends = at_ends * (outside > 0)
            to_fraction = to_fraction.addcdiv_(at_ends, scale)
        integer_shape, other_shape = ctx.shapes
        g_other = LN2 * to_fraction.sum_to_size(other_shape)
        g_integer = None
        if to_integer is not None and ctx.needs_input_grad[2]:
            g_integer = LN2 * to_integer.sum_to_size(integer_shape)
            if ctx.other_is_total:
                g_integer = g_integer - g_other.expand(integer_shape)
        return g_x, None, g_integer, g_other, None, None
