"""Sums and maxima over windows: hls4ml's images have their channels last."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from quant_ops.program import Convolution, Step
from quant_ops.requantize import Integers
from quant_ops.windows import Span
from search.exporters.hls.builder import SPATIAL, Builder, Places, image
from search.exporters.hls.fixed import holding
from search.exporters.hls.network import HOLE, Block, Value


def convolution(
    builder: Builder, step: Convolution, source: Value, shape: tuple[int, ...]
) -> Value:
    """The sums of a convolution; one dimension is an image of height 1.

    Args:
        builder: of the network.
        step: the convolution.
        source: what it reads.
        shape: of its result, (channels, *spatial).
    """
    places, padding = _spread(source.places, step)
    if len(step.stride) > SPATIAL:
        return _by_taps(
            builder, step, source, np.pad(places, ((0, 0), *padding), constant_values=HOLE)
        )
    source = Value(source.block, source.shape, places, source.low, source.high)
    source = builder.laid(source, image(places.shape), step.name)
    kernel = _kernel(step)
    if len(step.stride) < SPATIAL:
        kernel = kernel[:, :, None]
    kernel = kernel.transpose(2, 3, 1, 0)
    missing = SPATIAL - len(step.stride)
    strides = (1,) * missing + step.stride
    (top, bottom), (left, right) = ((0, 0),) * missing + padding
    laid = image(shape)
    attributes = {
        **_sizes(source.shape, laid[0]), "n_chan": source.shape[2], "n_filt": laid[0][2],
        "filt_height": kernel.shape[0], "filt_width": kernel.shape[1],
        "stride_height": strides[0], "stride_width": strides[1],
        "pad_top": top, "pad_bottom": bottom, "pad_left": left, "pad_right": right,
        "data_format": "channels_last", "padding": "same", "weight_data": kernel,
    }  # fmt: skip
    taps = kernel.reshape(-1, kernel.shape[-1])
    block = (f"sums{step.out}", "Conv2D", step.name)
    pads = max(max(p) for p in padding) > 0
    return builder.linear(source, block, taps, attributes, laid, pads=pads)


def pointwise(
    builder: Builder, step: Step, source: Value, weights: NDArray[np.float64], places: Integers
) -> Value:
    """The same sums at every position of an image (1, positions, n).

    Args:
        builder: of the network.
        step: what they are a part of.
        source: the image.
        weights: (n, sums).
        places: where the elements of the result lie among (positions, sums).
    """
    _, positions, n = source.shape
    shape = (1, positions, weights.shape[1])
    attributes = {
        **_sizes(source.shape, shape), "n_chan": n, "n_filt": shape[2],
        "filt_height": 1, "filt_width": 1, "stride_height": 1, "stride_width": 1,
        "pad_top": 0, "pad_bottom": 0, "pad_left": 0, "pad_right": 0,
        "data_format": "channels_last", "padding": "valid", "weight_data": weights[None, None],
    }  # fmt: skip
    block = (f"sums{step.out}", "Conv2D", step.name)
    return builder.linear(source, block, weights, attributes, (shape, places))


def window_sums(
    builder: Builder, step: Step, source: Value, spans: Mapping[int, Span], steps: Mapping[int, int]
) -> Value:
    """Sums over the windows that `spans` gives for some axes, other axes kept.

    Args:
        builder: of the network.
        step: the average.
        source: what it reads.
        spans: axis of the graph's shape to (start, end) per output position.
        steps: axis to the distance of neighbours in a window.
    """
    windows = _windows(source.places, spans, steps, repeats=False)
    laid = image(windows.shape[:-1])
    lying = _lying(windows, laid)
    image_of_windows = builder.gathered(source, lying[None], step.name)
    ones = np.ones((lying.shape[1], 1))
    return pointwise(builder, step, image_of_windows, ones, laid[1])


def maxima(
    builder: Builder, step: Step, source: Value, spans: Mapping[int, Span], steps: Mapping[int, int]
) -> Value:
    """Maxima over windows; arguments as for `window_sums`."""
    windows = _windows(source.places, spans, steps, repeats=True)
    laid = image(windows.shape[:-1])
    lying = _lying(windows, laid)
    source = builder.gathered(source, lying[:, :, None], step.name)
    return pooling(builder, step, source, ((len(lying), 1, 1), laid[1]), (1, lying.shape[1]))


def pooling(
    builder: Builder,
    step: Step,
    source: Value,
    laid: Places,
    kernel: Sequence[int],
    strides: Sequence[int] = (1, 1),
) -> Value:
    """Maxima of whole windows of an image.

    Args:
        builder: of the network.
        step: the maximum.
        source: the image.
        laid: of the result.
        kernel: (height, width).
        strides: (height, width).
    """
    shape, _ = laid
    attributes = {
        **_sizes(source.shape, shape), "n_filt": source.shape[2],
        "pool_height": kernel[0], "pool_width": kernel[1],
        "stride_height": strides[0], "stride_width": strides[1],
        "pad_top": 0, "pad_bottom": 0, "pad_left": 0, "pad_right": 0,
        "data_format": "channels_last", "padding": "valid", "count_pad": False,
    }  # fmt: skip
    result = holding(int(source.low.min()), int(source.high.max()))
    precision = {"result": result, "accum": result}
    name = f"largest{step.out}"
    block = Block(name, "MaxPooling2D", (source.block,), precision, attributes, step.name)
    return builder.append(block, laid, source.low, source.high)


def _sizes(source: tuple[int, ...], result: tuple[int, ...]) -> dict[str, int]:
    return {
        "in_height": source[0], "in_width": source[1],
        "out_height": result[0], "out_width": result[1],
    }  # fmt: skip


def _spread(places: Integers, step: Convolution) -> tuple[Integers, tuple[tuple[int, int], ...]]:
    """Zeros between neighbours, as a transposed convolution has them, then what is cropped away.

    Returns:
        Places, and the padding that is left.
    """
    sizes = [(n - 1) * s + 1 for n, s in zip(places.shape[1:], step.input_stride, strict=True)]
    spread = np.full((places.shape[0], *sizes), HOLE)
    spread[(slice(None), *(slice(None, None, s) for s in step.input_stride))] = places
    kept = [
        slice(max(-before, 0), size - max(-after, 0))
        for size, (before, after) in zip(sizes, step.padding, strict=True)
    ]
    padding = tuple((max(before, 0), max(after, 0)) for before, after in step.padding)
    return spread[(slice(None), *kept)], padding


def _by_taps(builder: Builder, step: Convolution, source: Value, padded: Integers) -> Value:
    """More axes than hls4ml's images have: every position brings its own copy of its window."""
    kernel = _kernel(step)
    axes = tuple(range(1, padded.ndim))
    windows = sliding_window_view(padded, kernel.shape[2:], axes)
    windows = windows[(slice(None), *(slice(None, None, s) for s in step.stride))]
    spatial = windows.shape[1 : padded.ndim]
    taps = np.moveaxis(windows, 0, len(spatial)).reshape(1, int(np.prod(spatial)), -1)
    places = np.arange(taps.shape[1] * len(kernel)).reshape(*spatial, -1)
    columns = kernel.reshape(len(kernel), -1).T
    gathered = builder.gathered(source, taps, step.name)
    return pointwise(builder, step, gathered, columns, np.moveaxis(places, -1, 0))


def _kernel(step: Convolution) -> NDArray[np.float64]:
    """(out, in, *kernel): groups and dilation become zeros."""
    out, per_group, *taps = step.weights.shape
    spread = [(k - 1) * d + 1 for k, d in zip(taps, step.dilation, strict=True)]
    kernel = np.zeros((out, per_group * step.groups, *spread))
    places = tuple(slice(None, None, d) for d in step.dilation)
    rows = out // step.groups
    for group in range(step.groups):
        mine = slice(group * rows, (group + 1) * rows)
        theirs = slice(group * per_group, (group + 1) * per_group)
        kernel[(mine, theirs, *places)] = step.weights[mine]
    return kernel


def _windows(
    places: Integers, spans: Mapping[int, Span], steps: Mapping[int, int], *, repeats: bool
) -> Integers:
    """(*result, longest window): a shorter one has its first place again, or holes."""
    for axis, (start, end) in spans.items():
        counts = -(-(end - start) // steps[axis])
        offset = np.arange(counts.max())
        index = start[:, None] + offset * steps[axis]
        inside = offset < counts[:, None]
        index = np.where(inside, index, start[:, None] if repeats else places.shape[axis])
        hole = np.full_like(places.take([0], axis), HOLE)
        places = np.concatenate([places, hole], axis).take(index, axis)
        places = np.moveaxis(places, axis + 1, -1)
    return places.reshape(*places.shape[: places.ndim - len(spans)], -1)


def _lying(windows: Integers, laid: Places) -> Integers:
    """(outputs, window): each output where `laid` has it."""
    lying = np.empty((windows[..., 0].size, windows.shape[-1]), np.int64)
    lying[laid[1].reshape(-1)] = windows.reshape(len(lying), -1)
    return lying
