"""Convolutions and pooling: hls4ml's images have their channels last."""

import numpy as np
from numpy.typing import NDArray

from quant_ops.program import Convolution, Move
from search.exporters.hls.builder import Builder, Places
from search.exporters.hls.fixed import holding
from search.exporters.hls.network import Block, Inexpressible, Value
from search.exporters.wires import pair

SPATIAL = 2


def image(shape: tuple[int, ...]) -> Places:
    """Where the elements of one sample (channels, *spatial) lie in an array channels last."""
    if not 2 <= len(shape) <= 1 + SPATIAL:
        size = int(np.prod(shape, dtype=int))
        return (size,), np.arange(size).reshape(shape)
    height = (1,) if len(shape) <= SPATIAL else ()
    laid = (*height, *shape[1:], shape[0])
    places = np.moveaxis(np.arange(int(np.prod(laid))).reshape(*shape[1:], shape[0]), -1, 0)
    return laid, places


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
    if max(step.input_stride) > 1 or min(min(pads) for pads in step.padding) < 0:
        raise Inexpressible(step.name, "is a transposed or cropping convolution")
    if len(step.stride) > SPATIAL:
        raise Inexpressible(step.name, "has three spatial axes")
    kernel = _kernel(step)
    missing = SPATIAL - len(step.stride)
    strides = (1,) * missing + step.stride
    (top, bottom), (left, right) = ((0, 0),) * missing + step.padding
    size, laid = _image_of(source, step.name), image(shape)
    attributes = {
        **_sizes(size, laid[0]), "n_chan": size[2], "n_filt": laid[0][2],
        "filt_height": kernel.shape[0], "filt_width": kernel.shape[1],
        "stride_height": strides[0], "stride_width": strides[1],
        "pad_top": top, "pad_bottom": bottom, "pad_left": left, "pad_right": right,
        "data_format": "channels_last", "padding": "same", "weight_data": kernel,
    }  # fmt: skip
    taps = kernel.reshape(-1, kernel.shape[-1])
    block = (f"sums{step.out}", "Conv2D", step.name)
    pads = max(max(p) for p in step.padding) > 0
    return builder.linear(source, block, taps, attributes, laid, pads=pads)


def pooling(builder: Builder, step: Move, source: Value, shape: tuple[int, ...]) -> Value:
    """Maxima of whole windows; arguments as for `convolution`."""
    kernel = pair(step.args[1])
    strides = pair(step.args[2] if len(step.args) > 2 else ()) or kernel
    size, laid = _image_of(source, step.name), image(shape)
    attributes = {
        **_sizes(size, laid[0]), "n_filt": size[2],
        "pool_height": kernel[0], "pool_width": kernel[1],
        "stride_height": strides[0], "stride_width": strides[1],
        "pad_top": 0, "pad_bottom": 0, "pad_left": 0, "pad_right": 0,
        "data_format": "channels_last", "padding": "valid", "count_pad": False,
    }  # fmt: skip
    result = holding(int(source.low.min()), int(source.high.max()))
    precision = {"result": result, "accum": result}
    name = f"moved{step.out}"
    block = Block(name, "MaxPooling2D", (source.block,), precision, attributes, step.name)
    return builder.append(block, laid, source.low, source.high)


def _sizes(source: tuple[int, ...], result: tuple[int, ...]) -> dict[str, int]:
    return {
        "in_height": source[0], "in_width": source[1],
        "out_height": result[0], "out_width": result[1],
    }  # fmt: skip


def _image_of(source: Value, name: str) -> tuple[int, ...]:
    shape, places = image(source.places.shape)
    if source.shape != shape or not np.array_equal(source.places, places):
        raise Inexpressible(name, "reads an image whose channels do not lie side by side")
    return shape


def _kernel(step: Convolution) -> NDArray[np.float64]:
    """(height, width, in, out): groups and dilation become zeros."""
    out, per_group, *taps = step.weights.shape
    spread = [(k - 1) * d + 1 for k, d in zip(taps, step.dilation, strict=True)]
    kernel = np.zeros((out, per_group * step.groups, *spread))
    places = tuple(slice(None, None, d) for d in step.dilation)
    rows = out // step.groups
    for group in range(step.groups):
        mine = slice(group * rows, (group + 1) * rows)
        theirs = slice(group * per_group, (group + 1) * per_group)
        kernel[(mine, theirs, *places)] = step.weights[mine]
    if len(spread) < SPATIAL:
        kernel = kernel[:, :, None]
    return kernel.transpose(2, 3, 1, 0)
