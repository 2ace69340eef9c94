"""Integer steps: exact sums, rescaled by `quant_ops.runtime_mode` or, on request, by `exact.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_ops.machine import FLOAT32_EXACT
from quant_ops.program import (
    Average,
    Combine,
    Concatenate,
    Convolution,
    Input,
    Lookup,
    MatMul,
    Multiply,
    Step,
)
from quant_ops.requantize import Codes, Rescale
from quant_ops.runtime_mode import (
    INT8_MAX,
    INT16_MAX,
    FusedForm,
    fused_form,
    is_wide,
    largest_pairs,
    term_constants,
)
from search.exporters.onnx_graph.builder import Unsupported
from search.exporters.onnx_graph.exact import Term, rescaled, source_term
from search.exporters.onnx_graph.state import WriterState
from search.exporters.onnx_graph.weights import integer_rows

UINT8_MIDDLE = 128


def put_input(state: WriterState, step: Input) -> str:
    """A network input, quantized where the program says so."""
    name = f"x{step.position}"
    return name if step.codes is None else state.quantized(name, step.codes)


def put_convolution(state: WriterState, step: Convolution) -> str:
    """QLinearConv where it can, else the exact sums and a rescaling of their own.

    For exact rescalings sums are a float32 Conv where no partial one can reach 2^24: ConvInteger
    takes several times as long.
    """
    _require_int32(step)
    source = _narrow(state, step.sources[0])
    result = state.codes(step.out)
    x, pads = _padded(state, step)
    attributes = {
        "strides": step.stride,
        "dilations": step.dilation,
        "pads": [before for before, _ in pads] + [after for _, after in pads],
        "group": step.groups,
    }
    if state.exact and step.bound < FLOAT32_EXACT:
        kernel = _kernel(state, step, integer_rows(state.builder, state.layer_of(step)))
        inputs = [state.centered(step.sources[0], x), state.builder.cast(kernel, "float32")]
        total = state.builder.node("Conv", inputs, **attributes)
        return _scaled(state, step.out, step.rescale, total, bound=step.bound, is_float=True)
    form = None if state.exact else fused_form(step, source, result)
    if form is not None:
        return _fused(state, step, form, x, attributes)

    def sums(weights: str, zero: str) -> str:
        inputs = [x, weights, state.builder.constant(np.uint8(state.zero(step.sources[0]))), zero]
        return state.builder.node("ConvInteger", inputs, **attributes)

    rows = integer_rows(state.builder, state.layer_of(step))
    total = _exact_sums(state, step.weights, _kernel(state, step, rows), source, sums)
    return _scaled(state, step.out, step.rescale, total, bound=step.bound)


def _fused(
    state: WriterState, step: Convolution, form: FusedForm, x: str, attributes: Mapping[str, Any]
) -> str:
    builder = state.builder
    rows = integer_rows(builder, state.layer_of(step), form.factor)
    weights, zero = _as_bytes(state, _kernel(state, step, rows), form.signed)
    one = builder.constant(np.float32(1))
    result = state.codes(step.out)
    inputs = [
        x, one, builder.constant(np.uint8(state.zero(step.sources[0]))),
        weights, builder.constant(form.multiplier), zero,
        one, builder.constant(np.uint8(state.zero(step.out))), builder.constant(form.bias),
    ]  # fmt: skip
    whole = builder.node("QLinearConv", inputs, **attributes)
    return state.clipped(whole, step.rescale.low - result.low, step.rescale.high - result.low)


def put_matmul(state: WriterState, step: MatMul) -> str:
    """MatMulInteger and a rescaling."""
    _require_int32(step)
    builder = state.builder
    source = _narrow(state, step.sources[0])
    x = state.value(step.sources[0])
    rows = integer_rows(builder, state.layer_of(step))
    turned = builder.node("Transpose", [rows], perm=[1, 0])
    x_zero = builder.constant(np.uint8(state.zero(step.sources[0])))

    def sums(weights: str, zero: str) -> str:
        return builder.node("MatMulInteger", [x, weights, x_zero, zero])

    total = _exact_sums(state, step.weights, turned, source, sums)
    return _scaled(state, step.out, step.rescale, total, bound=step.bound)


def put_lookup(state: WriterState, step: Lookup) -> str:
    """The table as codes, made once at load, and a Gather."""
    rows = integer_rows(state.builder, state.layer_of(step))
    bound = int(np.abs(step.weights.astype(np.int64)).max(initial=0))
    table = _scaled(state, step.out, step.rescale, rows, bound=bound)
    return state.builder.node("Gather", [table, state.value(step.sources[0])], axis=0)


def put_combine(state: WriterState, step: Combine) -> str:
    """Products and one Sum. An Add between DequantizeLinears would be fused to other arithmetic."""
    return _sum_of(state, step.out, step.rescale, step.sources)


def put_multiply(state: WriterState, step: Multiply) -> str:
    """An exact product, rescaled."""
    left, right = (_narrow(state, source).bound for source in step.sources)
    product = state.builder.node("Mul", [state.centered(n) for n in step.sources])
    return _scaled(state, step.out, step.rescale, product, bound=left * right, is_float=True)


def put_concatenate(state: WriterState, step: Concatenate) -> str:
    """Each part rescaled alone, then joined."""
    parts = [
        _sum_of(state, step.out, rescale, (source,))
        for rescale, source in zip(step.rescales, step.sources, strict=True)
    ]
    return state.builder.node("Concat", parts, axis=step.axis)


def put_average(state: WriterState, step: Average) -> str:
    """Exact sums in float32: over whole axes ReduceSum, over windows products with 0 and 1."""
    _narrow(state, step.sources[0])
    if step.bound >= FLOAT32_EXACT:
        raise Unsupported(
            "its sums exceed 2^24 and would not be exact in float32",
            "average over smaller windows, or export to the packed format",
        )
    builder = state.builder
    total = state.centered(step.sources[0])
    shape = state.graph.nodes[step.sources[0]].shape
    whole_axes = []
    for axis, (start, end) in zip(step.axes, step.windows, strict=True):
        if len(start) > 1:
            total = _window_sums(state, total, axis, len(shape), _pattern(start, end, shape[axis]))
            continue
        if (int(start[0]), int(end[0])) != (0, shape[axis]):
            ends = [builder.ints(int(x[0])) for x in (start, end)]
            total = builder.node("Slice", [total, *ends, builder.ints(axis)])
        whole_axes.append(axis)
    if whole_axes:
        keep = int(step.keep_axes)
        total = builder.node("ReduceSum", [total, builder.ints(*whole_axes)], keepdims=keep)
    return _scaled(state, step.out, step.rescale, total, bound=step.bound, is_float=True)


def _pattern(start: NDArray[np.int64], end: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """(size, positions): 1 where a position's window covers an entry."""
    at = np.arange(size)[:, None]
    return ((at >= start) & (at < end)).astype(np.float32)


def _window_sums(
    state: WriterState, x: str, axis: int, rank: int, pattern: NDArray[np.float32]
) -> str:
    builder = state.builder
    if axis == rank - 2:
        return builder.node("MatMul", [builder.constant(pattern.T), x])
    if axis == rank - 1:
        return builder.node("MatMul", [x, builder.constant(pattern)])
    order = [*(a for a in range(rank) if a != axis), axis]
    turned = builder.node("Transpose", [x], perm=order)
    summed = builder.node("MatMul", [turned, builder.constant(pattern)])
    return builder.node("Transpose", [summed], perm=np.argsort(order).tolist())


def _sum_of(state: WriterState, out: int, rescale: Rescale, sources: Sequence[int]) -> str:
    if state.exact:
        return rescaled(state, out, rescale, [source_term(state, n) for n in sources])
    builder = state.builder
    result = state.codes(out)
    units = [1.0 if state.is_codes(n) else state.codes(n).scale for n in sources]
    unit = result.scale if is_wide(result) else 1.0
    factors, constant = term_constants(rescale, units, unit)
    terms = []
    for source, factor in zip(sources, factors, strict=True):
        if state.is_codes(source) and factor.ndim == 0:
            zero = builder.constant(np.uint8(state.zero(source)))
            inputs = [state.value(source), builder.constant(factor), zero]
            terms.append(builder.node("DequantizeLinear", inputs))
        else:
            inputs = [state.centered(source), builder.constant(factor)]
            terms.append(builder.node("Mul", inputs))
    if constant.any():
        terms.append(builder.constant(constant))
    total = terms[0] if len(terms) == 1 else builder.node("Sum", terms)
    return state.finished(out, rescale, total)


def _scaled(
    state: WriterState,
    out: int,
    rescale: Rescale,
    sums: str,
    *,
    bound: int,
    is_float: bool = False,
) -> str:
    """Codes of one accumulator of at most `bound`: rescaled exactly, or in float32.

    In float32 there are two roundings before that to a code: of the product, of adding the bias.
    """
    if state.exact:
        return rescaled(state, out, rescale, [Term(sums, (-bound, bound))])
    builder = state.builder
    result = state.codes(out)
    (factor,), constant = term_constants(rescale, [1.0], result.scale if is_wide(result) else 1.0)
    real = sums if is_float else builder.cast(sums, "float32")
    real = builder.node("Mul", [real, builder.constant(factor)])
    if constant.any():
        real = builder.node("Add", [real, builder.constant(constant)])
    return state.finished(out, rescale, real)


def _exact_sums(
    state: WriterState,
    weights: NDArray[np.int16],
    name: str,
    source: Codes,
    sums: Callable[[str, str], str],
) -> str:
    """int32 sums of uint8 codes and weights of up to 9 bits: twice the halves plus the rest."""
    builder = state.builder
    if np.abs(weights.astype(np.int64)).max(initial=0) <= INT8_MAX:
        return sums(*_as_bytes(state, name, _fits(weights, source)))
    two = builder.constant(np.int32(2))
    halves = builder.node("Div", [name, two])
    rest = builder.node("Sub", [name, builder.node("Mul", [halves, two])])
    truncated = np.trunc(weights / 2).astype(np.int64)
    parts = [
        sums(*_as_bytes(state, halves, _fits(truncated, source))),
        sums(*_as_bytes(state, rest, signed=True)),
    ]
    return builder.node("Add", [builder.node("Mul", [parts[0], two]), parts[1]])


def _fits(weights: NDArray[Any], source: Codes) -> bool:
    """Whether two products of neighbours stay inside int16, where kernels add them there."""
    return bool((largest_pairs(weights) * (source.high - source.low) <= INT16_MAX).all())


def _as_bytes(state: WriterState, name: str, signed: bool) -> tuple[str, str]:
    """int32 weights as int8, or as uint8 with zero point 128; and that zero point."""
    builder = state.builder
    if signed:
        return builder.cast(name, "int8"), builder.constant(np.int8(0))
    moved = builder.node("Add", [name, builder.constant(np.int32(UINT8_MIDDLE))])
    return builder.cast(moved, "uint8"), builder.constant(np.uint8(UINT8_MIDDLE))


def _kernel(state: WriterState, step: Convolution, rows: str) -> str:
    """int32 rows in the shape of the convolution, flipped in space for a transposed one."""
    builder = state.builder
    kernel = builder.node("Reshape", [rows, builder.ints(*step.weights.shape)])
    layer = state.graph.layer_at[state.graph.index_of[step.name]]
    if layer.kind != "conv_transpose":
        return kernel
    axes = list(range(2, step.weights.ndim))
    backwards = builder.ints(*[-1] * len(axes))
    ends = builder.ints(*[np.iinfo(np.int64).min] * len(axes))
    return builder.node("Slice", [kernel, backwards, ends, builder.ints(*axes), backwards])


def _padded(state: WriterState, step: Convolution) -> tuple[str, Sequence[tuple[int, int]]]:
    """The source as a plain convolution reads it, and what that convolution still pads.

    Zeros between neighbours and negative padding are written out; both hold the zero point.
    """
    builder = state.builder
    x = state.value(step.sources[0])
    spread = max(step.input_stride) > 1
    if not spread and min(end for pair in step.padding for end in pair) >= 0:
        return x, step.padding
    zero = builder.constant(np.uint8(state.zero(step.sources[0])))
    channels, *sizes = state.graph.nodes[step.sources[0]].shape[1:]
    rank = len(sizes)
    after = [b for _, b in step.padding]
    if spread:
        apart = [n for size in sizes for n in (size, 1)]
        x = builder.node("Reshape", [x, builder.ints(-1, channels, *apart)])
        ends = [n for stride in step.input_stride for n in (0, stride - 1)]
        pads = builder.ints(*[0] * (2 + 2 * rank), 0, 0, *ends)
        x = builder.node("Pad", [x, pads, zero])
        joined = [size * stride for size, stride in zip(sizes, step.input_stride, strict=True)]
        x = builder.node("Reshape", [x, builder.ints(-1, channels, *joined)])
        after = [b - s + 1 for b, s in zip(after, step.input_stride, strict=True)]
    pads = builder.ints(0, 0, *(before for before, _ in step.padding), 0, 0, *after)
    return builder.node("Pad", [x, pads, zero]), [(0, 0)] * rank


def _narrow(state: WriterState, number: int) -> Codes:
    """The codes of a source that must fit a byte."""
    if not state.is_codes(number):
        raise Unsupported(
            "it reads codes of more than 8 bits", "narrow that activation to 8 bits or fewer"
        )
    return state.codes(number)


def _require_int32(step: Convolution | MatMul) -> None:
    if step.accumulator_bits != 32:
        raise Unsupported("its sums can exceed 32 bits", "give its weights or its input fewer bits")


INTEGER_STEPS: Mapping[type[Step], Callable[[WriterState, Any], str]] = {
    Input: put_input,
    Convolution: put_convolution,
    MatMul: put_matmul,
    Lookup: put_lookup,
    Combine: put_combine,
    Multiply: put_multiply,
    Average: put_average,
    Concatenate: put_concatenate,
}
