"""Sums over the HGQ modules of a network: EBOPs, bytes, what training is charged."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant_ops.hgq.layers import HGQLayer
from quant_ops.hgq.quantizer import FixedPointQuantizer


def layers_of(model: nn.Module) -> list[HGQLayer]:
    """HGQ layers in order.

    Raises:
        ValueError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, HGQLayer)]
    if not layers:
        raise ValueError("the model has no HGQ layer; build it from HGQLinear, HGQConv2d, ...")
    return layers


def quantizers_of(model: nn.Module) -> list[FixedPointQuantizer]:
    """Every quantizer once."""
    return [module for module in model.modules() if isinstance(module, FixedPointQuantizer)]


def ebops(model: nn.Module) -> Tensor:
    """EBOPs of the last forward pass in training mode, one sample; differentiable.

    Raises:
        ValueError: a layer has not run in training mode yet.
    """
    counts = [layer.ebops for layer in layers_of(model)]
    if any(count is None for count in counts):
        raise ValueError("no EBOPs yet: run a forward pass in training mode, or trace_ranges")
    return torch.stack([count for count in counts if count is not None]).sum()


def code_bytes(model: nn.Module) -> Tensor:
    """Bytes of the weight codes where every channel has its widest weight's width; differentiable.

    Widths count the sign; a channel without bits is free. Scales, biases and header come on top:
    the size of a file is what `cost_models.size` says of its candidate.
    """
    total = torch.zeros(())
    for layer in layers_of(model):
        out = layer.weight.shape[0]
        bits = layer.weight_quantizer.magnitude_bits()
        signed = layer.weight_quantizer.signed
        stored = torch.relu(bits) + (signed * (bits > 0)).detach()
        widest = stored.expand(out, *stored.shape[1:]).reshape(out, -1).amax(1)
        total = total + widest.sum() * (layer.weight[0].numel() / 8)
    return total


def penalty(
    model: nn.Module, *, beta: float | Tensor, gamma: float = 1e-8, of: str = "ebops"
) -> Tensor:
    """What is added to a task's loss: beta * cost + gamma * sum of the learned bits.

    The second term is signed, so that bits without a share in the cost shrink too [Sun2024].

    Args:
        model: has run forward in training mode.
        beta: price of one EBOP, or byte.
        gamma: price of one learned bit.
        of: "ebops" or "code_bytes".
    """
    costs = {"ebops": ebops, "code_bytes": code_bytes}
    if of not in costs:
        raise ValueError(f"cost {of!r} is not known; charge {' or '.join(costs)}")
    cost = costs[of](model)
    bits = [b.reshape(-1) for q in quantizers_of(model) for b in q.charged_bits()]
    return beta * cost + gamma * torch.cat(bits).sum()


@torch.no_grad()
def digit_span_ebops(model: nn.Module) -> float:
    """EBOPs where a weight counts the span from its first to its last non-zero binary digit.

    The exact count after training of the paper [Sun2024]: 001xx1000 has 4 digits. Trailing zeros
    cost nothing, so that it is never above `ebops`, which counts declared widths; biases are left
    out. Needs a forward pass in training mode, as `ebops` does.
    """
    total = 0.0
    for layer in layers_of(model):
        total += float(layer.multiplications(digit_spans(layer.quantized_weight())))
    return total


def digit_spans(values: Tensor) -> Tensor:
    """Number of binary digits from the first to the last that is not 0; 0 for 0.

    >>> digit_spans(torch.tensor([0.0, 1.0, 0.375, -40.0]))
    tensor([0., 1., 2., 3.])
    """
    mantissa, _ = torch.frexp(values.abs().double())
    whole = (mantissa * 2**53).long()
    lowest = (whole & -whole).clamp_min(1)
    return torch.where(
        whole > 0, 53 - torch.log2(lowest.double()), torch.zeros_like(mantissa)
    ).float()


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    modules = [m for m in model.modules() if isinstance(m, FixedPointQuantizer | HGQLayer)]
    was_training = model.training
    model.eval()
    for module in modules:
        module.tracing = True
    try:
        yield
    finally:
        for module in modules:
            module.tracing = False
        model.train(was_training)


@torch.no_grad()
def trace_ranges(model: nn.Module, inputs: Iterable[Sequence[Tensor] | Tensor]) -> float:
    """Set integer bits and signs of WRAP quantizers from data, as deployment needs; EBOPs after.

    Args:
        model: its other quantizers stay as they are.
        inputs: batches, each a tensor or the model's arguments.
    """
    for quantizer in quantizers_of(model):
        quantizer.reset_range()
    with _tracing(model):
        for batch in inputs:
            model(*([batch] if isinstance(batch, Tensor) else batch))
        return float(ebops(model))
