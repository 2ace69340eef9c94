"""The second mode of the reference: an integer program with ONNX Runtime's requantization.

Sums are the same exact integers. From a sum to a code the way is one float32 product and
round-half-even instead of the 64-bit multiplier and shift of REQUANTIZATION.md. Three forms:

    fused   code = clamp(roundHalfEven(float32(k a + B) * m) + z)      B an int32, per channel
    tail    code = clamp(roundHalfEven(float32(a) * m + c) + z)        two float32 roundings
    terms   code = clamp(roundHalfEven(x_1 m_1 + x_2 m_2 + ... + c) + z), left to right

A fused sum is QLinearConv's own arithmetic. The whole number k scales the weights of a channel up
inside int8, so that the unit of the sum, to which the bias is rounded there, is a small part of a
code. Wide values (network outputs, partial sums) are real float32 numbers: the same without
rounding and zero point. No product is followed by a sum inside one operator, so fused
multiply-add cannot change a result and the mode is exact on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.machine import Array, Outputs
from quant_ops.program import (
    Average,
    Combine,
    Concatenate,
    Convolution,
    IntegerProgram,
    Lookup,
    MatMul,
    Multiply,
    Step,
)
from quant_ops.requantize import WIDE_LIMIT, Codes, Rescale
from quant_ops.torch_machine import TorchMachine

Floats32 = NDArray[np.float32]
Whole = NDArray[np.int64]

BYTE_LEVELS = 256
INT8_MAX, INT16_MAX, INT32_MAX = 127, 2**15 - 1, 2**31 - 1
MAX_BIAS_ERROR = 8e-4  # mean of a layer, in codes: about the share of its codes that changes


@dataclass(frozen=True, slots=True, eq=False)
class FusedForm:
    """Constants of QLinearConv, one entry per output channel.

    Attributes:
        factor: k, at least 1.
        bias: B, of the sum of k w (x - z).
        multiplier: m.
        signed: weights are int8; otherwise uint8 with zero point 128, because two products of
            neighbours could exceed the 16-bit sums of processors without VNNI.
    """

    factor: NDArray[np.int32]
    bias: NDArray[np.int32]
    multiplier: Floats32
    signed: bool


def is_wide(codes: Codes) -> bool:
    """Whether a value holds integers of up to 2^24, which this mode keeps as real numbers."""
    return codes.high - codes.low >= BYTE_LEVELS


def largest_pairs(weights: NDArray[np.integer[Any]]) -> Whole:
    """For each row the largest magnitude that two of its weights of one sign can sum to."""
    wide = weights.reshape(len(weights), -1).astype(np.int64)
    if wide.shape[1] < 2:
        single: Whole = np.abs(wide).max(1, initial=0)
        return single
    ends = np.sort(wide, axis=1)
    top = np.maximum(ends[:, -1], 0) + np.maximum(ends[:, -2], 0)
    bottom = np.maximum(-ends[:, 0], 0) + np.maximum(-ends[:, 1], 0)
    both: Whole = np.maximum(top, bottom)
    return both


def fused_form(step: Convolution, source: Codes, result: Codes) -> FusedForm | None:
    """QLinearConv's constants, or None where it cannot compute this step well.

    It cannot where weights exceed int8, sums could exceed int32, the result is wide, or rounding
    the bias to the unit of the sum would change more than `MAX_BIAS_ERROR` of the codes. int8
    weights come first, since they run faster.
    """
    weights = step.weights.reshape(len(step.weights), -1)
    largest: Whole = np.abs(weights.astype(np.int64)).max(1, initial=0)
    if is_wide(result) or is_wide(source) or largest.max(initial=0) > INT8_MAX:
        return None
    ratio, constant = (np.broadcast_to(x.reshape(-1), largest.shape) for x in ratios(step.rescale))
    ratio = np.where(ratio == 0, 1.0, ratio)  # a pruned channel: all its sums are 0
    most = np.where(largest > 0, INT8_MAX // np.maximum(largest, 1), 1)
    pairs = largest_pairs(weights)
    fitting = INT16_MAX // max(source.high - source.low, 1) // np.maximum(pairs, 1)
    for signed, top in ((True, np.minimum(most, fitting)), (False, most)):
        if not top.all():
            continue
        factor = _best_factors(top, constant / ratio)
        bias = np.rint(constant / ratio * factor)
        error = np.abs(bias / factor * ratio - constant)
        holds = np.abs(bias) + float(step.bound) * factor <= INT32_MAX
        if float(error.mean()) <= MAX_BIAS_ERROR and holds.all():
            return FusedForm(
                factor.astype(np.int32),
                bias.astype(np.int32),
                np.asarray(ratio / factor, np.float32),
                signed,
            )
    return None


def _best_factors(top: Whole, bias: NDArray[np.float64]) -> Whole:
    """For each channel the factor from `top` down to its half whose bias rounds least."""
    factors = np.empty_like(top)
    for channel, highest in enumerate(top):
        tried = np.arange(highest, highest // 2, -1)
        exact = bias[channel] * tried
        factors[channel] = tried[np.argmin(np.abs(np.rint(exact) - exact) / tried)]
    return factors


def ratios(rescale: Rescale, of: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factor of accumulator `of` and the constant, in units of the result, as the shift has them.

    Both have the shape of the rescaling's constants.
    """
    half = (np.int64(1) << rescale.shift) >> 1
    multiplier = np.broadcast_to(rescale.multipliers[of], rescale.shift.shape)
    return (
        np.ldexp(multiplier.astype(np.float64), -rescale.shift),
        np.ldexp((rescale.offset - half).astype(np.float64), -rescale.shift),
    )


def real_limits(codes: Codes, rescale: Rescale) -> tuple[np.float32 | None, np.float32 | None]:
    """The clamp of a wide result as real numbers; None: no clamp on that side."""
    low, high = (
        None if abs(end) >= WIDE_LIMIT else np.float32(codes.scale * (end - codes.zero_point))
        for end in (rescale.low, rescale.high)
    )
    return low, high


def run_runtime_mode(
    program: IntegerProgram, inputs: Sequence[Array], keep: Sequence[str] = ()
) -> Outputs:
    """What ONNX Runtime computes; integers of outputs are those nearest to the real numbers."""
    return RuntimeMachine(program).run(inputs, keep)


class RuntimeMachine(TorchMachine):
    """Codes as float32 tensors of integers, wide values as float32 real numbers."""

    def __init__(self, program: IntegerProgram) -> None:
        super().__init__(program)
        self._forms: dict[int, FusedForm | None] = {}

    def _codes(self, number: int) -> Codes:
        codes = self._program.codes[number]
        assert codes is not None
        return codes

    def _output(self, number: int) -> tuple[Array, NDArray[np.int32] | None]:
        codes = self._program.codes[number]
        if codes is None or not is_wide(codes):
            return super()._output(number)
        real = self._values[number].numpy()
        return real, np.rint(real.astype(np.float64) / codes.scale).astype(np.int32)

    def _dequantize(self, value: Any, codes: Codes) -> Tensor:
        return value if is_wide(codes) else super()._dequantize(value, codes)

    def _convolution(self, step: Convolution) -> Any:
        sums = self._convolution_sums(step)
        if step.out not in self._forms:
            codes = [self._codes(number) for number in (step.sources[0], step.out)]
            self._forms[step.out] = fused_form(step, *codes)
        form = self._forms[step.out]
        if form is None:
            return self._summed(step.out, step.rescale, [sums])
        shape = (-1, *[1] * (sums.dim() - 2))
        factor, bias, multiplier = (
            torch.from_numpy(x).reshape(shape) for x in (form.factor, form.bias, form.multiplier)
        )
        whole = sums.long() * factor.long() + bias.long()
        return self._finish(step.out, step.rescale, whole.float() * multiplier)

    def _matmul(self, step: MatMul) -> Any:
        return self._summed(step.out, step.rescale, [self._matmul_sums(step)])

    def _average(self, step: Average) -> Any:
        return self._summed(step.out, step.rescale, [self._average_sums(step)])

    def _lookup(self, step: Lookup) -> Any:
        table = self._summed(step.out, step.rescale, [self._weights(step)])
        return table[self._values[step.sources[0]].long()]

    def _combine(self, step: Combine) -> Any:
        return self._summed(step.out, step.rescale, self._centered(step), step.sources)

    def _multiply(self, step: Multiply) -> Any:
        left, right = self._centered(step)
        return self._summed(step.out, step.rescale, [left * right])

    def _concatenate(self, step: Concatenate) -> Any:
        parts = [
            self._summed(step.out, rescale, [x], (source,))
            for rescale, x, source in zip(
                step.rescales, self._centered(step), step.sources, strict=True
            )
        ]
        return torch.cat(parts, step.axis)

    def _summed(
        self, out: int, rescale: Rescale, sums: Sequence[Tensor], sources: Sequence[int] = ()
    ) -> Tensor:
        """The form "terms" (and "tail", which is one term), to codes or to a wide value."""
        result = self._codes(out)
        unit = result.scale if is_wide(result) else 1.0
        units = [1.0] * len(sums)
        for i, source in enumerate(sources):
            codes = self._codes(source)
            units[i] = codes.scale if is_wide(codes) else 1.0
        factors, constant = term_constants(rescale, units, unit)
        total = sums[0].float() * torch.from_numpy(factors[0])
        for x, factor in zip(sums[1:], factors[1:], strict=True):
            total = total + x.float() * torch.from_numpy(factor)
        if constant.any():
            total = total + torch.from_numpy(constant)
        return self._finish(out, rescale, total)

    def _finish(self, out: int, rescale: Rescale, total: Tensor) -> Tensor:
        """Rounded and clamped, or, of a wide value, clamped."""
        codes = self._codes(out)
        if is_wide(codes):
            low, high = real_limits(codes, rescale)
            return (
                total.clamp(
                    None if low is None else float(low), None if high is None else float(high)
                )
                if (low, high) != (None, None)
                else total
            )
        return (total.round() + codes.zero_point).clamp(rescale.low, rescale.high)


def term_constants(
    rescale: Rescale, units: Sequence[float], unit: float
) -> tuple[list[Floats32], Floats32]:
    """float32 factors of the terms, and the constant.

    Args:
        rescale: of the step.
        units: for each source what one unit of its integers is worth where the source is a wide
            value, else 1.
        unit: scale of a wide result, else 1.
    """
    factors, constant = [], np.zeros(0)
    for i, of in enumerate(units):
        ratio, constant = ratios(rescale, i)
        factors.append(np.asarray(ratio * (unit / of), np.float32))
    return factors, np.asarray(constant * unit, np.float32)


def changed_codes(program: IntegerProgram, inputs: Sequence[Array]) -> dict[str, tuple[float, int]]:
    """Edge name to the share of codes this mode changes, and by how much, from equal inputs.

    Every step is computed twice from what the normative reference computed before it, so that
    differences do not add up through the network.
    """
    return _Beside(program).compare(inputs)


class _Beside(TorchMachine):
    """The normative machine, with this mode's result of each step beside its own."""

    def compare(self, inputs: Sequence[Array]) -> dict[str, tuple[float, int]]:
        self._mode = RuntimeMachine(self._program)
        self._names = {number: name for name, number in self._program.edges.items()}
        self._found: dict[str, tuple[float, int]] = {}
        self._execute = {kind: self._twice(kind) for kind in self._execute}
        self.run(inputs, ())
        return self._found

    def _twice(self, kind: type[Step]) -> Callable[[Any], Any]:
        own, other = self._execute[kind], self._mode._execute[kind]

        def execute(step: Step) -> Any:
            self._mode._inputs = self._inputs
            value = own(step)
            mine = other(step)
            if step.out in self._names and self._program.codes[step.out] is not None:
                distance = (value - mine).abs()
                self._found[self._names[step.out]] = (
                    float((distance > 0).float().mean()),
                    int(distance.max()),
                )
            codes = self._program.codes[step.out]
            is_real = codes is not None and is_wide(codes) and isinstance(value, Tensor)
            self._mode._values[step.out] = value * codes.scale if is_real and codes else value
            return value

        return execute
