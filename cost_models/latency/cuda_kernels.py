"""A call as a function that makes torch's or torchao's kernels run, on made-up values.

Between calls values are float32 or int8 codes. What computes in half precision casts its input and
its result, and what computes on codes rescales its result: torch runs these steps as kernels of
their own, so they are part of the call's time. Nothing here needs a GPU but the 4-bit kernel.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cost_models.latency.cuda_device import GROUP_SIZE, INT_MM, CudaDevice, as_matmul, padded
from cost_models.latency.work import Work
from quant_ops.errors import EnvironmentFault

Run = Callable[[], object]
Step = Callable[[Tensor], Tensor]

PLAIN_CHANNELS = 16  # a network's input has fewer, and comes in torch's default layout
SCALE = 0.01


def build(work: Work, kernel: str, device: CudaDevice) -> Run:
    """A function that makes a call's kernels run, on made-up values that lie on the device."""
    coded = kernel in ("int8", "fp8") and work.operator != "quantize"
    inputs = [_values(shape, device, coded=coded) for shape in input_shapes(work)]
    if work.operator != "layout":
        inputs = [_as_in_a_network(x) for x in inputs]
    if work.operator not in ("conv", "linear"):
        return _data_call(work, inputs, coded=coded)
    product = _product(work, kernel, device)
    if not coded:
        return lambda: _with_addend(product(inputs[0]), inputs[1:]).relu_()
    n_out = work.dims[1]
    channels = (n_out, 1, 1) if work.operator == "conv" else (n_out,)
    scale, bias = (_values(channels, device, coded=False) for _ in range(2))

    def on_codes() -> Tensor:
        return _to_codes(torch.addcmul(bias, _with_addend(product(inputs[0]), inputs[1:]), scale))

    return on_codes


def _as_in_a_network(x: Tensor) -> Tensor:
    """Images channels last, but for what is the network's input."""
    is_inner = x.ndim == 4 and x.shape[1] >= PLAIN_CHANNELS
    return x.contiguous(memory_format=torch.channels_last) if is_inner else x


def input_shapes(work: Work) -> list[tuple[int, ...]]:
    """Shapes of the values that a call reads."""
    if work.operator == "conv":
        n_in, n_out, height, width = work.dims
        first = (1, n_in, height, width)
        return [first, (1, n_out, *work.out_size)] if work.adds else [first]
    if work.operator == "linear":
        n_in, _, rows = work.dims
        return [(rows, n_in)]
    if work.operator in ("max_pool", "average_pool", "mean"):
        return [(1, *work.dims)]
    if work.operator == "copy":  # every second run
        elements, run = work.dims
        return [(-(-elements // run), 2, run)]
    if work.operator == "layout":
        channels = math.gcd(PLAIN_CHANNELS, work.dims[0])
        return [(1, channels, work.dims[0] // channels, 1)]
    return [work.dims] * (2 if work.operator == "add" else 1)


def _product(work: Work, kernel: str, device: CudaDevice) -> Step:
    """The layer itself; of codes a result that is not rescaled yet and has no bias."""
    shape = as_matmul(work)
    if shape is None or not _has_matmul(work, kernel, device):
        return _in_precision(work, kernel, device)
    of_codes = kernel in ("int8", "fp8")
    multiply = (_code_matmul if of_codes else _weight_only)(kernel, shape, device)
    if work.operator == "linear":
        return multiply
    _, n_in, n_out = shape
    height, width = work.out_size

    def pointwise(x: Tensor) -> Tensor:
        rows = multiply(x.permute(0, 2, 3, 1).reshape(-1, n_in))
        return rows.reshape(1, height, width, n_out).permute(0, 3, 1, 2)

    return pointwise


def _has_matmul(work: Work, kernel: str, device: CudaDevice) -> bool:
    """Whether a matrix product on packed or integer weights is what runs."""
    if kernel == "int8":
        return device.capability >= INT_MM
    return work.operator == "linear" and kernel in ("fp8", "weight4", "weight8")


def _in_precision(work: Work, kernel: str, device: CudaDevice) -> Step:
    """A layer on floats: whole ones for float32, halves cast from and to what the call has."""
    dtype = torch.float32 if kernel == "float32" else device.half
    n_out = work.dims[1]
    weight = _values(_weight_shape(work), device, coded=False).to(dtype)
    bias = None if kernel == "int8" else _values((n_out,), device, coded=False).to(dtype)
    layer = _linear(weight, bias) if work.operator == "linear" else _conv(work, weight, bias)
    if dtype is torch.float32:
        return layer
    if kernel == "int8":  # codes are rescaled from what was computed
        return lambda x: layer(x.to(dtype))
    return lambda x: layer(x.to(dtype)).float()


def _weight_shape(work: Work) -> tuple[int, ...]:
    n_in, n_out = work.dims[:2]
    if work.operator == "linear":
        return n_out, n_in
    return n_out, n_in // work.groups, *work.attribute("kernel")


def _linear(weight: Tensor, bias: Tensor | None) -> Step:
    return lambda x: F.linear(x, weight, bias)


def _conv(work: Work, weight: Tensor, bias: Tensor | None) -> Step:
    """A convolution, channels last; padding that differs on two sides is a copy before it."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    top, left, bottom, right = work.attribute("pads")
    is_even = (top, left) == (bottom, right)
    border = (left, right, top, bottom)
    settings: dict[str, Any] = {
        "stride": work.attribute("stride"),
        "padding": (top, left) if is_even else 0,
        "dilation": work.attribute("dilation"),
        "groups": work.groups,
    }
    return lambda x: F.conv2d(x if is_even else F.pad(x, border), weight, bias, **settings)


def _code_matmul(kernel: str, shape: tuple[int, int, int], device: CudaDevice) -> Step:
    rows, n_in, n_out = shape
    to_rows, to_in, to_out = padded(kernel, shape)
    weight = _values((to_out, to_in), device, coded=True)
    border = (0, to_in - n_in, 0, to_rows - rows)
    pad: Step = (lambda x: F.pad(x, border)) if any(border) else (lambda x: x)
    if kernel == "int8":
        return lambda x: torch._int_mm(pad(x), weight.t())[:rows, :n_out]
    float8, one = torch.float8_e4m3fn, torch.ones((), device=device.place)
    matrix = weight.to(float8)

    def multiply(x: Tensor) -> Tensor:
        product = torch._scaled_mm(pad(x).to(float8), matrix.t(), one, one, out_dtype=torch.float32)
        return product[:rows, :n_out]

    return multiply


def _weight_only(kernel: str, shape: tuple[int, int, int], device: CudaDevice) -> Step:
    """torchao's linear layer with packed weights.

    Raises:
        EnvironmentFault: this version of torchao left the layer as it was.
    """
    _, n_in, n_out = shape
    _, to_in, _ = padded(kernel, shape)
    quantization: Any = importlib.import_module("torchao.quantization")
    config = (
        quantization.Int4WeightOnlyConfig(
            group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"
        )
        if kernel == "weight4"
        else quantization.Int8WeightOnlyConfig()
    )
    layer = nn.Linear(to_in, n_out, device=device.place, dtype=device.half)
    layer.requires_grad_(requires_grad=False)
    quantization.quantize_(layer, config)
    if type(layer.weight.data) is Tensor:
        raise EnvironmentFault(
            f"torchao {device.torchao} does not quantize a linear layer {to_in} -> {n_out} for "
            f"the kernel {kernel}; install another version, or none to leave the kernel out"
        )
    if to_in == n_in:
        return lambda x: layer(x.to(device.half)).float()
    return lambda x: layer(F.pad(x.to(device.half), (0, to_in - n_in))).float()


def _with_addend(x: Tensor, addends: Sequence[Tensor]) -> Tensor:
    """With what the call adds; codes to be added have a scale of their own."""
    for addend in addends:
        x = torch.add(x, addend, alpha=2)
    return x


def _to_codes(x: Tensor) -> Tensor:
    """Floats in units of a code as codes, a lower limit of 0 included."""
    return x.round().clamp_(0, 127).to(torch.int8)


def _data_call(work: Work, inputs: list[Tensor], *, coded: bool) -> Run:
    x = inputs[0]
    if work.operator == "quantize":
        return lambda: _to_codes(x * SCALE)
    if work.operator == "dequantize":
        return lambda: x * SCALE
    if work.operator == "copy":
        return lambda: x[:, 0].contiguous()
    if work.operator == "layout":
        # clones even where sizes of 1 make both layouts the same
        return lambda: x.clone(memory_format=torch.channels_last)
    if work.operator == "add":
        y = inputs[1]
        if not coded:
            return lambda: x + y
        return lambda: _to_codes(torch.add(x * SCALE, y, alpha=SCALE))
    pool = _pool(work)
    return (lambda: _to_codes(pool(x.float()))) if coded else (lambda: pool(x))


def _pool(work: Work) -> Step:
    if work.operator == "mean":
        return lambda x: x.mean((2, 3), keepdim=True)
    kernel, stride, pads = (work.attribute(name) for name in ("kernel", "stride", "pads"))
    pool: Any = F.max_pool2d if work.operator == "max_pool" else F.avg_pool2d
    return lambda x: pool(x, kernel, stride, pads[:2])


def _values(shape: tuple[int, ...], device: CudaDevice, *, coded: bool) -> Tensor:
    if coded:
        return torch.randint(0, 16, shape, dtype=torch.int8, device=device.place)
    return torch.randn(shape, device=device.place)
