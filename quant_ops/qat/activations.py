"""Activation quantizers whose step, offset or clip is learned with the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from quant_ops.quantized import ActivationQuant

RULES = ("lsq", "lsq+", "pact", "pact+")


class LearnedActivation(nn.Module):
    """Per-tensor fake quantization of one edge with learned parameters.

    "lsq" learns the step [Esser2020], "lsq+" also the zero point of an edge that may be negative
    [Bhalgat2020], "pact" the clip of an edge that is not negative, from values beyond it
    [Choi2018b], "pact+" from those inside as well. What pact does not cover has its step learned.

    Differs from the papers: the logarithm of the step is learned, as in
    `quant_ops.qat.weights.LearnedStep`; offsets are whole codes, as they are stored.

    Args:
        bit_width: of the codes.
        signed: whether codes may be negative.
        scale: the step; None takes 2 mean|x| / sqrt(largest code) of the first batch in training.
        zero_point: the code of 0.
        rule: one of `RULES`.

    Attributes:
        log_scale: natural logarithm of the step, parameter ().
        zero_point: parameter (), real; whole in the forward pass.
        clips: whether it is learned as a clip.
    """

    is_set: Tensor

    def __init__(
        self,
        bit_width: int,
        *,
        signed: bool,
        scale: float | None = None,
        zero_point: int = 0,
        rule: str = "lsq",
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"activations must be quantized by one of {RULES}, got {rule!r}")
        start = ActivationQuant(bit_width, signed, 1.0 if scale is None else scale, zero_point)
        self.low, self.high = start.code_range
        self._start = start
        self.clips = rule in ("pact", "pact+") and self.low - zero_point >= 0
        self._inside = rule != "pact" or not self.clips
        self.log_scale = nn.Parameter(torch.tensor(start.scale, dtype=torch.float64).log().float())
        moves = rule == "lsq+" and (signed or zero_point != 0)
        self.zero_point = nn.Parameter(torch.tensor(float(zero_point)), requires_grad=moves)
        self.register_buffer("is_set", torch.tensor(scale is not None))

    @classmethod
    def of(cls, quant: ActivationQuant, rule: str = "lsq") -> "LearnedActivation":
        """Starts from a stored quantizer."""
        return cls(
            quant.bit_width,
            signed=quant.signed,
            scale=quant.scale,
            zero_point=quant.zero_point,
            rule=rule,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The nearest representable values. `x`: (batch, ...)."""
        if self.training and not bool(self.is_set):
            self._initialize(x)
        n = max(1, x.numel() // max(1, x.shape[0]))
        values: Tensor = _FakeQuantize.apply(x, self.log_scale, self.zero_point, self, n)  # type: ignore[no-untyped-call]
        return values

    def clip(self) -> Tensor:
        """The largest representable value, differentiable; pact keeps it small by a penalty."""
        return self.log_scale.exp() * self.high

    def stored(self) -> ActivationQuant:
        """The quantizer as it is stored."""
        quant = self._start
        return ActivationQuant(quant.bit_width, quant.signed, self._scale(), self._zero_point())

    def _scale(self) -> float:
        start = torch.tensor(self._start.scale, dtype=torch.float64).log().float()
        if float(self.log_scale.detach()) == float(start):  # the logarithm loses the last bit
            return self._start.scale
        return float(self.log_scale.detach().exp())

    def _zero_point(self) -> int:
        return round(min(max(float(self.zero_point.detach()), self.low), self.high))

    def _initialize(self, x: Tensor) -> None:
        with torch.no_grad():
            top = math.sqrt(max(1, self.high - self._zero_point()))
            self.log_scale.copy_((2 * x.abs().float().mean() / top).clamp_min(1e-12).log())
            self.is_set.fill_(True)


class _FakeQuantize(torch.autograd.Function):
    """The executor's fake quantizer forward, the rules' gradients backward.

    The same float32 operations one by one as in `torch.fake_quantize_per_tensor_affine`, whose
    loop over the values is several times slower on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, zero_point: Tensor, of: LearnedActivation, n: int
    ) -> Tensor:
        scale, zero = of._scale(), of._zero_point()
        step = torch.tensor(scale, dtype=torch.float32)
        at = x.float() * float(1 / step)
        codes = at.round() if zero == 0 else at.add(zero).round_()
        codes.clamp_(of.low, of.high)
        if zero:
            codes.sub_(zero)
        ctx.save_for_backward(at)
        ctx.of, ctx.n, ctx.scale, ctx.zero = of, n, scale, zero
        return codes.mul_(float(step)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (at,) = ctx.saved_tensors
        of, scale = ctx.of, ctx.scale
        wide = gradient.float()
        low, high = of.low - ctx.zero, of.high - ctx.zero
        clipped = at.clamp(low, high)
        inside = at == clipped
        by_x = torch.where(inside, wide, 0)
        by_zero = None
        if of.zero_point.requires_grad:
            outside = torch.where(inside, 0, wide).sum()  # a difference of sums would cancel
            by_zero = -outside * scale / math.sqrt(ctx.n * max(1, high))
        # outside the range the end of it, inside what rounding added
        if of._inside:
            slope = clipped.round_().sub_(torch.where(inside, at, 0))
        else:
            slope = torch.where(inside, 0, clipped)
        # PACT has no gradient scale; its clip is high * scale
        factor = max(1, high) ** 2 if of.clips else math.sqrt(ctx.n * max(1, high))
        total = slope.mul_(wide).sum() / (scale * factor)
        return by_x.to(gradient.dtype), total, by_zero, None, None
