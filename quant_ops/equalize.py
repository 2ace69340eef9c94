"""Float networks made easier to quantize, their outputs unchanged [Nagel2019].

Cross-layer equalization scales the output channels of a layer down and the matching input
channels of the next one up, where nothing but positively homogeneous operators lies between.
High-bias absorption moves what a rectifier always passes from one bias into the next.

Both serve quantizers whose step is shared by several channels: activation edges, whose step is
per tensor, the narrow relative scales of a layer, groups of input weights and depthwise layers
that differ widely from channel to channel. Weight steps here are per output channel already, so
that on weights alone little is to be gained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_ops.graph import Graph, Layer, Node, Params, Ref
from quant_ops.layout import from_canonical, to_canonical

# f(s x) = s f(x) for s > 0, position by position or over positions of one channel
HOMOGENEOUS = frozenset({
    "relu.default", "leaky_relu.default", "max_pool1d.default", "max_pool2d.default",
    "avg_pool1d.default", "avg_pool2d.default", "adaptive_avg_pool1d.default",
    "adaptive_avg_pool2d.default", "mean.dim", "flatten.using_ints", "reshape.default",
})  # fmt: skip
_ROUNDS = 40
_STILL = 1e-6  # largest change of a factor after which nothing more is done
_SPREADS = 3.0  # so many standard deviations below its mean a value hardly ever falls


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers, the second reading the first one's output through homogeneous operators.

    Attributes:
        first, second: names.
        spread: inputs of the second per output channel of the first, side by side (a flattened
            image has several).
        rectified: whether a ReLU is the only operator between that is not linear.
    """

    first: str
    second: str
    spread: int
    rectified: bool


def homogeneous_pairs(graph: Graph) -> tuple[Pair, ...]:
    """Every pair of searchable layers that may be equalized, in execution order."""
    pairs = []
    for layer in graph.searchable_layers:
        if layer.kind == "embedding" or len(layer.sites) != 1:
            continue
        found = _follow(graph, layer)
        if found is not None:
            pairs.append(found)
    return tuple(pairs)


def equalize(graph: Graph, params: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give both sides of every pair the same range in every channel.

    s_i = sqrt(r1_i / r2_i) with r the largest magnitude of the weights that make or read channel
    i; W1_i and b1_i are divided by it, the matching columns of W2 multiplied. Pairs are visited
    again and again until no factor moves. A channel that is 0 on either side stays.

    Args:
        graph: folded.
        params: its float parameters; not changed.

    Returns:
        The new parameters, and for every layer that was a pair's first (out_channels,) what its
        outputs are divided by.
    """
    out = dict(params)
    divided: dict[str, Tensor] = {}
    pairs = homogeneous_pairs(graph)
    for _ in range(_ROUNDS):
        largest = 0.0
        for pair in pairs:
            first, second = graph.layer_of[pair.first], graph.layer_of[pair.second]
            made = _rows(first, out[first.weight]).abs().amax(dim=1)
            read = _column_ranges(second, out[second.weight], pair.spread)
            usable = (made > 0) & (read > 0)
            factor = torch.where(usable, (made / read.clamp_min(1e-30)).sqrt(), 1.0)
            largest = max(largest, float((factor.log()).abs().max()))
            _scale_outputs(first, out, 1 / factor)
            _scale_inputs(second, out, factor.repeat_interleave(pair.spread))
            divided[first.name] = divided.get(first.name, torch.ones_like(factor)) * factor
        if largest < _STILL:
            break
    return out, divided


def absorb_high_biases(
    graph: Graph, params: Params, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Move c = max(0, mean - 3 std) of every rectified channel into the next layer's bias.

    relu(x) = relu(x - c) + c wherever x >= c, which fails for about one value in a thousand; the
    next layer meets c at every tap. Departure: only where the next layer does not pad, because a
    padded border holds 0 and not c.

    Args:
        graph: folded.
        params: its float parameters; not changed.
        mean: layer name to the mean of its output before the rectifier, (out_channels,).
        std: likewise the standard deviation.

    Returns:
        The new parameters, and c by layer, (out_channels,).
    """
    out = dict(params)
    levels: dict[str, Tensor] = {}
    for pair in homogeneous_pairs(graph):
        first, second = graph.layer_of[pair.first], graph.layer_of[pair.second]
        if not pair.rectified or pair.first not in mean or _pads(graph, second):
            continue
        if first.bias is None or second.bias is None:
            continue
        level = (mean[pair.first] - _SPREADS * std[pair.first]).clamp_min(0).double()
        taps = _canonical(second, out[second.weight]).double().flatten(2).sum(dim=2)
        per_input = level.repeat_interleave(pair.spread).reshape(second.groups, -1)
        per_group = second.out_channels // second.groups
        moved = (taps * per_input.repeat_interleave(per_group, dim=0)).sum(dim=1)
        out[first.bias] = (out[first.bias].double() - level).to(out[first.bias].dtype)
        out[second.bias] = (out[second.bias].double() + moved).to(out[second.bias].dtype)
        levels[first.name] = level
    return out, levels


def _follow(graph: Graph, layer: Layer) -> Pair | None:
    """Along the only consumers from a layer to the next one, None where they stop being legal."""
    at, rectified = layer.sites[0], False
    while True:
        users = graph.consumers[at]
        if len(users) != 1 or Ref(at) in graph.outputs:
            return None
        node = graph.nodes[users[0]]
        following = graph.layer_at.get(users[0])
        if following is not None:
            return _pair(graph, layer, following, at, users[0], rectified)
        if (
            node.op not in HOMOGENEOUS
            or node.args[0] != Ref(at)
            or not _keeps_channels(graph, node)
        ):
            return None
        rectified = rectified or node.op == "relu.default"
        at = users[0]


def _pair(
    graph: Graph, first: Layer, second: Layer, source: int, site: int, rectified: bool
) -> Pair | None:
    if (
        not second.searchable
        or second.kind == "embedding"
        or len(second.sites) != 1
        or graph.nodes[site].args[0] != Ref(source)
        or second.name == first.name
    ):
        return None
    n_inputs = _canonical_shape(second)[1] * second.groups
    if n_inputs % first.out_channels or (first.kind == "linear") != (
        len(graph.nodes[first.sites[0]].shape) == 2
    ):
        return None
    return Pair(first.name, second.name, n_inputs // first.out_channels, rectified)


def _keeps_channels(graph: Graph, node: Node) -> bool:
    """Whether channels stay on axis 1, or are flattened into features in their order."""
    source = node.args[0]
    assert isinstance(source, Ref)
    before, after = graph.nodes[source.index].shape, node.shape
    if node.op == "mean.dim":
        axes = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(axis, int) and axis % len(before) > 1 for axis in axes)
    if node.op in ("flatten.using_ints", "reshape.default"):
        if len(after) == 2 and len(before) >= 2:
            return True
        return len(before) > 1 and len(after) > 1 and before[1] == after[1]
    return True


def _pads(graph: Graph, layer: Layer) -> bool:
    node = graph.nodes[layer.sites[0]]
    if layer.kind == "linear":
        return False
    padding = node.args[4] if len(node.args) > 4 else 0
    amounts = padding if isinstance(padding, tuple) else (padding,)
    return layer.kind != "conv" or any(amount not in (0, "valid") for amount in amounts)


def _canonical(layer: Layer, weight: Tensor) -> Tensor:
    canonical = to_canonical(layer, weight)
    return canonical[:, :, None] if canonical.dim() == 2 else canonical


def _canonical_shape(layer: Layer) -> tuple[int, ...]:
    probe = torch.empty(layer.weight_shape, device="meta")
    return tuple(to_canonical(layer, probe).shape)


def _rows(layer: Layer, weight: Tensor) -> Tensor:
    return to_canonical(layer, weight).double().flatten(1)


def _column_ranges(layer: Layer, weight: Tensor, spread: int) -> Tensor:
    """(channels of the layer before,) the largest magnitude of the weights that read each."""
    canonical = _canonical(layer, weight).double().abs().flatten(2).amax(dim=2)
    grouped = canonical.reshape(layer.groups, -1, canonical.shape[1]).amax(dim=1)
    return grouped.reshape(-1, spread).amax(dim=1)


def _scale_outputs(layer: Layer, params: dict[str, Tensor], factor: Tensor) -> None:
    weight = params[layer.weight]
    canonical = to_canonical(layer, weight)
    shape = (-1,) + (1,) * (canonical.dim() - 1)
    scaled = (canonical.double() * factor.reshape(shape)).to(weight.dtype)
    params[layer.weight] = from_canonical(layer, scaled).contiguous()
    if layer.bias is not None:
        bias = params[layer.bias]
        params[layer.bias] = (bias.double() * factor).to(bias.dtype)


def _scale_inputs(layer: Layer, params: dict[str, Tensor], factor: Tensor) -> None:
    """`factor` of every input channel, (in_channels,)."""
    weight = params[layer.weight]
    canonical = to_canonical(layer, weight)
    per_group = factor.reshape(layer.groups, -1)
    rows = per_group.repeat_interleave(layer.out_channels // layer.groups, dim=0)
    shape = (*rows.shape, *(1,) * (canonical.dim() - 2))
    scaled = (canonical.double() * rows.reshape(shape)).to(weight.dtype)
    params[layer.weight] = from_canonical(layer, scaled).contiguous()
