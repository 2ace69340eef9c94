"""What a layer's inputs are on average, from batch norms alone: no data [Nagel2019].

A norm says of its output that each channel has mean beta and standard deviation |gamma|. Taken
for a normal distribution, that gives the moments after a rectifier or a clipping one, and they
add up over residual sums.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_ops.calibration import Calibration
from quant_ops.graph import Graph, Node, Params, Ref
from quant_ops.layout import to_canonical

Moments = tuple[Tensor, Tensor]  # mean and variance per channel, float64
_KEEPING = frozenset({
    "avg_pool1d.default", "avg_pool2d.default", "adaptive_avg_pool1d.default",
    "adaptive_avg_pool2d.default", "max_pool1d.default", "max_pool2d.default",
    "max_pool2d_with_indices.default", "mean.dim", "flatten.using_ints", "reshape.default",
    "constant_pad_nd.default", "pad.default", "_to_copy.default",
})  # fmt: skip


def expected_inputs(
    graph: Graph, params: Params, norms: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Layer name to (in_channels,) the mean of its input, for the layers where that is known.

    Departures: a pooled maximum counts as the value itself, residual branches as independent,
    the network's inputs as mean 0 and variance 1, and a layer without a norm gets the moments
    of a weighted sum of independent inputs.

    Args:
        graph: folded.
        params: its float parameters.
        norms: layer name to (beta, |gamma|) of the norm that was folded into it.
    """
    known: dict[int, Moments] = {}
    out: dict[str, Tensor] = {}
    for index, node in enumerate(graph.nodes):
        layer = graph.layer_at.get(index)
        source = node.args[0] if node.args else None
        before = known.get(source.index) if isinstance(source, Ref) else None
        if node.op == "input":
            channels = node.shape[1] if len(node.shape) > 1 else 1
            known[index] = (torch.zeros(channels).double(), torch.ones(channels).double())
        elif layer is not None and layer.kind != "embedding" and layer.kind != "other":
            n_inputs = _n_inputs(graph, index)
            if before is not None and n_inputs % len(before[0]) == 0:
                before = _spread(before, n_inputs // len(before[0]))
                out[layer.name] = before[0]
            else:
                before = None
            found = _after_layer(graph, params, index, before, norms.get(layer.name))
            if found is not None:
                known[index] = found
        elif before is not None:
            found = _after(graph, node, before, known)
            if found is not None:
                known[index] = found
    return out


def data_free(
    calibration: Calibration,
    graph: Graph,
    params: Params,
    norms: Mapping[str, tuple[Tensor, Tensor]],
) -> Calibration:
    """The calibration with the means of layer inputs that norms imply instead of the measured.

    Where norms say nothing, inputs are taken to be 0 on average, so that nothing is corrected.
    """
    expected = expected_inputs(graph, params, norms)
    taps = {}
    for name, measured in calibration.tap_mean.items():
        layer = graph.layer_of[name]
        mean = expected.get(name)
        per_group = (
            torch.zeros(measured.shape[:2]) if mean is None else mean.reshape(layer.groups, -1)
        )
        shape = (*per_group.shape, *(1,) * (measured.dim() - 2))
        taps[name] = per_group.reshape(shape).expand(measured.shape).to(measured.dtype).clone()
    means = {
        name: expected.get(name, torch.zeros_like(m)) for name, m in calibration.input_mean.items()
    }
    return replace(calibration, input_mean=means, tap_mean=taps)


def rectified(mean: Tensor, variance: Tensor, low: float, high: float) -> Moments:
    """Mean and variance of a normal variable clipped to [low, high]; high may be inf."""
    std = variance.clamp_min(1e-24).sqrt()
    a = (low - mean) / std
    b = torch.full_like(a, torch.inf) if high == torch.inf else (high - mean) / std
    inside = torch.special.ndtr(b) - torch.special.ndtr(a)
    pdf_a = _density(a)
    pdf_b = torch.zeros_like(b) if high == torch.inf else _density(b)
    top = 0.0 if high == torch.inf else high
    above = 1 - torch.special.ndtr(b)
    first = mean * inside + std * (pdf_a - pdf_b) + low * torch.special.ndtr(a) + top * above
    edge_b = torch.zeros_like(b) if high == torch.inf else (mean + high) * pdf_b
    second = (mean.square() + std.square()) * inside + std * ((mean + low) * pdf_a - edge_b)
    second = second + low**2 * torch.special.ndtr(a) + top**2 * above
    return first, (second - first.square()).clamp_min(0)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _after(
    graph: Graph, node: Node, before: Moments, known: Mapping[int, Moments]
) -> Moments | None:
    if node.op == "relu.default":
        return rectified(*before, 0.0, torch.inf)
    if node.op in ("relu6.default", "hardtanh.default", "clamp.default", "clamp_min.default"):
        low, high = (0.0, 6.0) if node.op == "relu6.default" else (*node.args[1:3], None, None)[:2]
        if not isinstance(low, int | float) or not isinstance(high, int | float | None):
            return None
        return rectified(*before, float(low), torch.inf if high is None else float(high))
    if node.op == "add.Tensor":
        other = node.args[1]
        theirs = known.get(other.index) if isinstance(other, Ref) else None
        if theirs is None or len(theirs[0]) != len(before[0]):
            return None
        return before[0] + theirs[0], before[1] + theirs[1]
    if node.op in _KEEPING:
        grown = len(before[0])
        return before if len(node.shape) < 2 or node.shape[1] % grown == 0 else None
    return None


def _after_layer(
    graph: Graph,
    params: Params,
    index: int,
    before: Moments | None,
    norm: tuple[Tensor, Tensor] | None,
) -> Moments | None:
    if norm is not None:
        return norm[0].double(), norm[1].double().square()
    if before is None:
        return None
    layer = graph.layer_at[index]
    rows = to_canonical(layer, params[layer.weight]).double()
    weight = rows.reshape(*rows.shape[:2], -1)
    per_group = layer.out_channels // layer.groups
    mean, variance = (
        m.reshape(layer.groups, -1).repeat_interleave(per_group, dim=0) for m in before
    )
    bias = params[layer.bias].double() if layer.bias is not None else 0.0
    return (
        (weight.sum(dim=2) * mean).sum(dim=1) + bias,
        (weight.square().sum(dim=2) * variance).sum(dim=1),
    )


def _n_inputs(graph: Graph, index: int) -> int:
    layer = graph.layer_at[index]
    probe = torch.empty(layer.weight_shape, device="meta")
    return int(to_canonical(layer, probe).shape[1]) * layer.groups


def _spread(before: Moments, times: int) -> Moments:
    return before[0].repeat_interleave(times), before[1].repeat_interleave(times)
