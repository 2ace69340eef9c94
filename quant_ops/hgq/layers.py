"""Linear and convolutional layers that quantize their input, weight and bias, and count EBOPs.

EBOPs, effective bit operations: the sum over all multiplications of the width of the weight times
the width of what it meets, plus the widths of the biases over all outputs [Sun2024]. Widths, and
the few conventions below, are those of HGQ2 0.2.0: signs count in SAT alone, trailing zeros are
not stripped, a convolution's bias counts once per input position.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.hgq.quantizer import ACTIVATIONS, BIASES, WEIGHTS, FixedPointQuantizer, QuantizerSpec
from quant_ops.taps import pads_of, tap_counts


class HGQActivation(nn.Module):
    """Quantizes a value that no HGQ layer reads at its input, such as the network's output.

    Args:
        shape: of the bits, (1, channels) for one width per feature; it must broadcast to the data.
        spec: initial bits and modes.
        function: applied before, such as `torch.relu`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        spec: QuantizerSpec = ACTIVATIONS,
        *,
        function: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.quantizer = spec.make(shape)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """x: of a shape that the bits broadcast to."""
        return cast(Tensor, self.quantizer(x if self.function is None else self.function(x)))


@dataclass(frozen=True, slots=True)
class LayerSpecs:
    """The three quantizers of a layer; without one for the bias it stays float and is not counted.

    `input` of granularity "element" means one width per feature of a linear layer, per pixel and
    channel of a convolution.
    """

    weight: QuantizerSpec = WEIGHTS
    input: QuantizerSpec = ACTIVATIONS
    bias: QuantizerSpec | None = BIASES


class HGQLayer(nn.Module):
    """What linear and convolutional layers have in common.

    Attributes:
        ebops: of the last forward pass in training mode (or while tracing) for one sample,
            differentiable; None before it.
        parallel: output positions that are computed at the same time, None for all of them; where
            fewer are, multipliers are used again and EBOPs shrink.
        training_pass: what runs in place of the forward pass in training mode; see FusedTraining.
    """

    shares_bias: ClassVar[bool]  # whether a smaller `parallel` makes the bias cheaper too
    ebops: Tensor | None
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        input_bits: tuple[int, ...],
        specs: LayerSpecs,
        parallel: int | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.parallel = parallel
        self.ebops = None
        self.tracing = False
        self._shape: tuple[int, ...] = ()
        self._prepared: tuple[Tensor | None, Tensor | None] = (None, None)
        self.training_pass: Callable[[Tensor], Tensor] | None = None
        shapes = {
            "element": tuple(weight.shape),
            "channel": (weight.shape[0],) + (1,) * (weight.dim() - 1),
            "tensor": (1,) * weight.dim(),
        }
        self.weight_quantizer = specs.weight.make(shapes[specs.weight.granularity], is_weight=True)
        self.weight_quantizer.raise_from_zero(weight)  # else no gradient passes the layer
        self.bias_quantizer: FixedPointQuantizer | None = None
        if bias is not None and specs.bias is not None:
            shared = specs.bias.granularity == "tensor"
            self.bias_quantizer = specs.bias.make((1,) if shared else tuple(bias.shape))
        self.input_quantizer = specs.input.make(input_bits)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ...) as the float layer takes it."""
        if self.training_pass is not None and self.training:
            return self.training_pass(x)
        x = self.input_quantizer(x)
        weight, bias = self._prepared
        self._prepared = (None, None)
        if weight is None:
            weight = self.weight_quantizer(self.weight)
        if bias is None and self.bias is not None:
            bias = self.bias
            if self.bias_quantizer is not None:
                bias = self.bias_quantizer(bias)
        self._shape = tuple(x.shape)
        if self.training or self.tracing:
            self.ebops = self._count()
        return self._apply_to(x, weight, bias)

    def prepare(self, values: Tensor, *, is_bias: bool) -> None:
        """Give the next forward pass its quantized weight or bias; see `quantize_together`."""
        weight, bias = self._prepared
        self._prepared = (weight, values) if is_bias else (values, bias)

    def quantized_weight(self) -> Tensor:
        """The weight of inference, dyadic numbers, in the layout of the float layer."""
        return _in_inference(self.weight_quantizer, self.weight)

    def quantized_bias(self) -> Tensor | None:
        """The bias of inference; as it is where it is not quantized, None without."""
        if self.bias is None or self.bias_quantizer is None:
            return self.bias
        return _in_inference(self.bias_quantizer, self.bias)

    def _apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def multiplications(self, widths: Tensor) -> Tensor:
        """Sum of widths times bits of what they meet, for one sample of the last forward's shape.

        widths: broadcastable to the weight.

        Raises:
            ValueError: nothing has been run yet.
        """
        if not self._shape:
            raise ValueError("the layer has not seen an input yet; run a forward pass first")
        return self._multiplications(self._shape, self.input_quantizer.bit_widths(), widths)

    def _count(self) -> Tensor:
        total = self.multiplications(self.weight_quantizer.bit_widths())
        shape = self._shape
        share = 1.0 if self.parallel is None else self.parallel / self._positions(shape)
        if self.bias is None or self.bias_quantizer is None:
            return total * share
        width = self.bias_quantizer.bit_widths().mean()
        n_biases = self.bias.numel() * self._bias_positions(shape)
        return total * share + width * (n_biases * (share if self.shares_bias else 1.0))

    def _multiplications(self, shape: Sequence[int], input_bits: Tensor, widths: Tensor) -> Tensor:
        """input_bits broadcast to (1, *shape[1:]), widths to the weight."""
        raise NotImplementedError

    def _positions(self, shape: Sequence[int]) -> int:
        """Output positions that share the weights."""
        raise NotImplementedError

    def _bias_positions(self, shape: Sequence[int]) -> int:
        return self._positions(shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last EBOPs, which belong to a graph and cannot be copied."""
        fresh = {"ebops": None, "_prepared": (None, None), "training_pass": None}
        return {**self.__dict__, **fresh}


def _in_inference(quantizer: FixedPointQuantizer, values: Tensor) -> Tensor:
    was_training, was_tracing = quantizer.training, quantizer.tracing
    quantizer.eval()
    quantizer.tracing = False
    with torch.no_grad():
        result: Tensor = quantizer(values)
    quantizer.train(was_training)
    quantizer.tracing = was_tracing
    return result


class HGQLinear(HGQLayer):
    """`nn.Linear` with learned widths; x is (batch, ..., in_features).

    Args:
        in_features, out_features, bias: as of nn.Linear.
        specs: the quantizers. Inputs per feature by default.
        parallel: see HGQLayer.
    """

    shares_bias: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        specs: LayerSpecs = LayerSpecs(),
        parallel: int | None = None,
    ) -> None:
        plain = nn.Linear(in_features, out_features, bias)
        size = 1 if specs.input.granularity == "tensor" else in_features
        super().__init__(
            plain.weight.detach(),
            plain.bias.detach() if bias else None,
            input_bits=(1, size),
            specs=specs,
            parallel=parallel,
        )

    def _apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _multiplications(self, shape: Sequence[int], input_bits: Tensor, widths: Tensor) -> Tensor:
        per_input = widths.expand(self.weight.shape).sum(0)
        return (per_input * input_bits).expand(1, len(per_input)).sum() * self._positions(shape)

    def _positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape[1:-1])


class _HGQConv(HGQLayer):
    shares_bias: ClassVar[bool] = False
    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        input_size: Sequence[int] | None = None,
        specs: LayerSpecs = LayerSpecs(),
        parallel: int | None = None,
    ) -> None:
        kind = (nn.Conv1d, nn.Conv2d)[self.rank - 1]
        plain = kind(in_channels, out_channels, kernel_size, groups=groups, bias=bias)  # type: ignore[arg-type]
        ones = (1,) * self.rank
        channels = 1 if specs.input.granularity == "tensor" else in_channels
        if specs.input.granularity == "element":
            if input_size is None:
                raise ValueError(
                    "inputs with a width per element need input_size=(height, width); give it, or "
                    'use granularity "channel" or "tensor"'
                )
            ones = tuple(input_size)
        super().__init__(
            plain.weight.detach(),
            plain.bias.detach() if plain.bias is not None else None,
            input_bits=(1, channels, *ones),
            specs=specs,
            parallel=parallel,
        )
        self.kernel_size = tuple(self.weight.shape[2:])
        self.stride, self.dilation = self._per_axis(stride), self._per_axis(dilation)
        self.padding = padding if isinstance(padding, str) else self._per_axis(padding)
        self.groups = groups

    def _per_axis(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.rank if isinstance(value, int) else tuple(value)

    def _apply_to(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv1d if self.rank == 1 else F.conv2d
        where: Any = (self.stride, self.padding, self.dilation, self.groups)
        return convolve(x, weight, bias, *where)

    def _multiplications(self, shape: Sequence[int], input_bits: Tensor, widths: Tensor) -> Tensor:
        out, per_group, *kernel = self.weight.shape
        met = self._met(shape, input_bits).reshape(self.groups, 1, per_group, *kernel)
        widths = widths.expand(self.weight.shape)
        return (met * widths.reshape(self.groups, out // self.groups, per_group, *kernel)).sum()

    def _met(self, shape: Sequence[int], input_bits: Tensor) -> Tensor:
        """(in_channels, *kernel): bits that a weight meets, summed over output positions."""
        n_channels, sizes = shape[1], tuple(shape[2:])
        pads = pads_of(self.padding, self.kernel_size, self.dilation)
        if all(size == 1 for size in input_bits.shape[2:]):
            counts = tap_counts(
                sizes, self.kernel_size, stride=self.stride, pads=pads, dilation=self.dilation
            )
            per_channel = input_bits.reshape(-1, *(1,) * self.rank).expand(
                n_channels, *(1,) * self.rank
            )
            return per_channel * torch.as_tensor(
                counts, dtype=input_bits.dtype, device=input_bits.device
            )
        bits = F.pad(input_bits.expand(1, *shape[1:]), [p for pad in reversed(pads) for p in pad])
        for axis in range(self.rank):
            bits = _windows(
                bits, 2 + axis, self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            )
        return bits[0]

    def _positions(self, shape: Sequence[int]) -> int:
        pads = pads_of(self.padding, self.kernel_size, self.dilation)
        return math.prod(
            (size + sum(pad) - spread * (taps - 1) - 1) // step + 1
            for size, pad, spread, taps, step in zip(
                shape[2:], pads, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )

    def _bias_positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape[2:])


def _windows(bits: Tensor, axis: int, taps: int, stride: int, dilation: int) -> Tensor:
    """Along one axis: for each tap the sum over the output positions."""
    n_out = (bits.shape[axis] - dilation * (taps - 1) - 1) // stride + 1
    reach = (n_out - 1) * stride + 1
    return torch.stack(
        [
            bits.narrow(axis, tap * dilation, reach)
            .index_select(axis, torch.arange(0, reach, stride, device=bits.device))
            .sum(axis)
            for tap in range(taps)
        ],
        axis,
    )


class HGQConv1d(_HGQConv):
    """`nn.Conv1d` with learned widths; x is (batch, channels, length). See HGQConv2d."""

    rank: ClassVar[int] = 1


class HGQConv2d(_HGQConv):
    """`nn.Conv2d` with learned widths, groups and depthwise included; x is (batch, c, h, w).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            nn.Conv2d; zeros are padded.
        input_size: (height, width) of the input where its widths differ by element.
        specs: the quantizers.
        parallel: see HGQLayer.
    """

    rank: ClassVar[int] = 2
