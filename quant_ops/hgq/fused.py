"""A network of HGQLinear layers trained as four vectors: few operations per step."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant_ops.hgq.fixed_point import LN2, ROUNDINGS, Arithmetic, Trained
from quant_ops.hgq.layers import HGQLayer, HGQLinear
from quant_ops.hgq.quantizer import FixedPointQuantizer
from quant_ops.hgq.totals import layers_of, quantizers_of


class FusedTraining:
    """Trains a network of HGQLinear layers by its own passes: same values, same gradients.

    The layers' parameters become views of four vectors, which are what an optimizer moves. The
    model stays usable for evaluation, tracing and state_dict; it must keep its device and layers.

        fused = FusedTraining(model)
        optimizer = torch.optim.Adam(fused.parameters(), fused=True)
        loss = criterion(fused(x), target) + fused.penalty(beta=1e-6)

    Attributes:
        values: weights and biases of all layers.
        integer_bits: one for each of them.
        total_bits: likewise.
        fraction_bits: one for each input feature of each layer.

    Args:
        model: every quantizer of it belongs to an HGQLinear, which reads (batch, features) once per
            pass and has widths per element: weight and bias "kbi", of one arithmetic that
            saturates, its input "kif" of WRAP.

    Raises:
        ValueError: a layer is not like that; `quantize_together` takes any.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [_checked(layer) for layer in layers_of(model)]
        inputs = [layer.input_quantizer for layer in layers]
        quantizers = [q for layer in layers for q in _parameter_quantizers(layer)]
        if len(quantizers_of(model)) != len(inputs) + len(quantizers):
            raise _unfit("a quantizer that belongs to no layer")
        if (
            len({(q.arithmetic, q.most_bits) for q in inputs}) > 1
            or len({q.arithmetic for q in quantizers}) > 1
        ):
            raise _unfit("quantizers that differ in their arithmetic")
        self.model, self._layers, self._inputs = model, layers, inputs
        self._arithmetic = quantizers[0].arithmetic
        owned = {id(p) for m in (*layers, *quantizers, *inputs) for p in m.parameters()}
        self._others = [p for p in model.parameters() if id(p) not in owned]
        tensors = [p for m in layers for p in (m.weight, m.bias) if p is not None]
        self.values = nn.Parameter(_gathered(tensors))
        self.integer_bits = nn.Parameter(_gathered([q.integer_bits for q in quantizers]))
        self.total_bits = nn.Parameter(_gathered([q.other_bits() for q in quantizers]))
        self.fraction_bits = nn.Parameter(_gathered([q.other_bits() for q in inputs]))
        self._range = _gathered([q.integer_bits for q in inputs])
        self._signed = _gathered([q.signed for q in quantizers])
        self._limit = torch.cat(
            [torch.full_like(q.signed, q.most_bits).reshape(-1) for q in quantizers]
        )
        counts = self._arithmetic.counts_sign
        self._extra = self._signed if counts else torch.zeros_like(self._signed)
        self._none = torch.zeros_like(self._limit)
        self._shapes = [tuple(t.shape) for t in tensors]
        self._input_sizes = [q.integer_bits.numel() for q in inputs]
        self._meets = _meets(layers)
        self._largest: list[Tensor] = []
        self._widths: tuple[Tensor, ...] = ()
        self._parts: dict[HGQLinear, tuple[Tensor | None, ...]] = {}
        for layer in layers:
            layer.training_pass = partial(self._run, layer)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer moves: the four vectors, then what belongs to no HGQ layer."""
        yield from (self.values, self.integer_bits, self.total_bits, self.fraction_bits)
        yield from self._others

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output, in evaluation mode too."""
        if not self.model.training:
            return cast(Tensor, self.model(x))
        self._prepare()
        y = cast(Tensor, self.model(x))
        self._follow()
        return y

    def ebops(self) -> Tensor:
        """EBOPs of the last pass in training mode, one sample; differentiable."""
        return self.penalty(beta=1.0, gamma=0.0)

    def penalty(self, *, beta: float | Tensor, gamma: float = 1e-8) -> Tensor:
        """`quant_ops.hgq.penalty` of the last pass in training mode.

        Raises:
            ValueError: there was none.
        """
        if not self._widths:
            raise ValueError("no EBOPs yet: run a forward pass in training mode")
        cost = _Cost.apply(  # type: ignore[no-untyped-call]
            self.total_bits, self.fraction_bits, *self._widths, self._meets, beta, gamma
        )
        return cast(Tensor, cost)

    @torch.no_grad()
    def _constrain(self) -> tuple[Tensor, Tensor]:
        """Bits within their limits; 2^f and 2^-f of all inputs."""
        most = self._inputs[0].most_bits
        self.fraction_bits.clamp_(-most, most)
        self.total_bits.copy_(self.total_bits.clamp(self._none, self._limit))
        scale = torch.exp2(torch.round(self.fraction_bits))
        return scale, 1 / scale

    def _prepare(self) -> None:
        scale, self._step = self._constrain()
        parts = _Quantize.apply(  # type: ignore[no-untyped-call]
            self.values,
            self._signed,
            self.integer_bits,
            self.total_bits,
            self.fraction_bits,
            self._arithmetic,
            self._shapes,
            self._input_sizes,
        )
        tensors, fractions = iter(parts[: len(self._shapes)]), parts[len(self._shapes) :]
        scales, steps = (
            torch.split(scale, self._input_sizes),
            torch.split(self._step, self._input_sizes),
        )
        for layer, *of_input in zip(self._layers, fractions, scales, steps, strict=True):
            weight = next(tensors)
            bias = None if layer.bias is None else next(tensors)
            self._parts[layer] = (weight, bias, *of_input)
        self._largest = []

    def _run(self, layer: HGQLinear, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise _unfit(f"an input of shape {tuple(x.shape)}")
        rounding = ROUNDINGS[layer.input_quantizer.arithmetic.rounding]
        y = _Linear.apply(x.float(), *self._parts[layer], rounding, self._largest)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)

    @torch.no_grad()
    def _follow(self) -> None:
        """Integer bits of the inputs after the largest values seen, as their quantizers do it."""
        if len(self._largest) != len(self._layers):
            raise _unfit("a layer that does not run exactly once per pass")
        needed = torch.ceil(torch.log2(torch.cat(self._largest) + self._step))
        decayed = self._range - self._inputs[0].integer_decay
        self._range.copy_(torch.maximum(decayed, needed))
        input_bits = torch.relu(torch.round(self._range) + torch.round(self.fraction_bits))
        self._widths = (torch.round(self.total_bits) + self._extra, input_bits)


class _Quantize(torch.autograd.Function):
    """All weights and biases quantized, cut into tensors; fraction bits cut into layers."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        signed: Tensor,
        integer_bits: Tensor,
        total_bits: Tensor,
        fraction_bits: Tensor,
        arithmetic: Arithmetic,
        shapes: Sequence[tuple[int, ...]],
        input_sizes: list[int],
    ) -> tuple[Tensor, ...]:
        y = Trained.forward(ctx, values, signed, integer_bits, total_bits, arithmetic, True)
        cut = torch.split(y, [math.prod(shape) for shape in shapes])
        tensors = [part.view(shape) for part, shape in zip(cut, shapes, strict=True)]
        return (*tensors, *torch.split(fraction_bits.detach().clone(), input_sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        n_values = ctx.saved_tensors[0].numel()
        joined = torch.cat([g.reshape(-1) for g in gradients])
        to_values, _, to_integer, to_total, _, _ = Trained.backward(ctx, joined[:n_values])
        return to_values, None, to_integer, to_total, joined[n_values:], None, None, None


class _Linear(torch.autograd.Function):
    """A linear layer on its quantized input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fraction_bits: Tensor,
        scale: Tensor,
        step: Tensor,
        rounding: Callable[[Tensor], Tensor],
        largest: list[Tensor],
    ) -> Tensor:
        quantized = rounding(x * scale).mul_(step)
        largest.append(quantized.abs().amax(0))
        ctx.save_for_backward(x - quantized, quantized, weight)
        ctx.has_bias = bias is not None
        return F.linear(quantized, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        error, quantized, weight = ctx.saved_tensors
        to_x = g @ weight
        to_bias = g.sum(0) if ctx.has_bias else None
        to_fraction = LN2 * (error * to_x).sum(0)
        return to_x, g.t() @ quantized, to_bias, to_fraction, None, None, None, None


class _Cost(torch.autograd.Function):
    """beta * EBOPs + gamma * sum of the learned bits, in one pass over all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        total_bits: Tensor,
        fraction_bits: Tensor,
        widths: Tensor,
        input_bits: Tensor,
        meets: Tensor,
        beta: float | Tensor,
        gamma: float,
    ) -> Tensor:
        met = torch.cat([input_bits, input_bits.new_ones(1)])[meets]
        ctx.save_for_backward(widths, input_bits, met, meets)
        ctx.prices = beta, gamma
        return beta * widths.dot(met) + gamma * (total_bits.sum() + fraction_bits.sum())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        widths, input_bits, met, meets = ctx.saved_tensors
        beta, gamma = ctx.prices
        per_input = widths.new_zeros(len(input_bits) + 1).index_add_(0, meets, widths)[:-1]
        to_total = (met * (g * beta)).add_(g * gamma)
        to_fraction = (per_input * (input_bits > 0)).mul_(g * beta).add_(g * gamma)
        return to_total, to_fraction, None, None, None, None, None


def _unfit(what: str) -> ValueError:
    return ValueError(
        f"FusedTraining does not take {what}; train with quant_ops.hgq.quantize_together instead"
    )


def _parameter_quantizers(layer: HGQLinear) -> list[FixedPointQuantizer]:
    both = (layer.weight_quantizer, layer.bias_quantizer)
    return [quantizer for quantizer in both if quantizer is not None]


def _checked(layer: HGQLayer) -> HGQLinear:
    if not isinstance(layer, HGQLinear):
        raise _unfit(f"a layer {type(layer).__name__}")
    if layer.parallel is not None or (layer.bias is None) != (layer.bias_quantizer is None):
        raise _unfit("a layer that shares multipliers or has a bias that is not quantized")
    for quantizer, values in (
        (layer.weight_quantizer, layer.weight),
        (layer.bias_quantizer, layer.bias),
    ):
        if quantizer is not None and not (
            quantizer.learns_total
            and quantizer.arithmetic.saturates
            and values is not None
            and quantizer.shape == tuple(values.shape)
        ):
            raise _unfit('weights or biases that are not "kbi", saturating, with bits per element')
    source = layer.input_quantizer
    if (
        source.learns_total
        or not source.follows_range
        or source.shape != (1, layer.weight.shape[1])
    ):
        raise _unfit('inputs that are not "kif", of WRAP, with bits per feature')
    return layer


@torch.no_grad()
def _gathered(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all; the tensors become views of it."""
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for tensor, part in zip(
        tensors, torch.split(joined, [t.numel() for t in tensors]), strict=True
    ):
        tensor.data = part.view(tensor.shape)
    return joined


def _meets(layers: Sequence[HGQLinear]) -> Tensor:
    """For each weight the number of the input that it meets, for a bias one more than there are."""
    n_inputs = sum(layer.weight.shape[1] for layer in layers)
    found, before = [], 0
    for layer in layers:
        n_out, n_in = layer.weight.shape
        found.append(torch.arange(before, before + n_in).repeat(n_out))
        if layer.bias is not None:
            found.append(torch.full((n_out,), n_inputs))
        before += n_in
    return torch.cat(found).to(layers[0].weight.device)
