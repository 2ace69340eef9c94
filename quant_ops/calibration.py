"""What calibration data tell: means of layer inputs and outputs, ranges of edges."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from quant_ops.executor import Executor, Transform
from quant_ops.graph import Graph, Layer, Node, ParamRef, Params, Ref
from quant_ops.layout import to_canonical
from quant_ops.operators import implementation
from quant_ops.quantized import ActivationQuant
from quant_ops.quantizers import Levels
from quant_ops.ranges import RANGE_SETTERS

HISTOGRAM_BINS = 4096
_SAMPLES_PER_BATCH = 1 << 16


@dataclass(frozen=True, eq=False)
class EdgeRange:
    """The distribution of one value of the float network.

    Attributes:
        minimum, maximum, mean: over all calibration data.
        limit: the histogram covers -limit to limit, a power of two.
        histogram: (4096,) float64 counts of a fixed sample.
    """

    minimum: float
    maximum: float
    mean: float
    limit: float
    histogram: Tensor

    @property
    def centers(self) -> Tensor:
        """(4096,) the middle of each bin, float32."""
        bins = torch.arange(HISTOGRAM_BINS, dtype=torch.float64) + 0.5
        return (bins * (2 * self.limit / HISTOGRAM_BINS) - self.limit).float()


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of the float network on calibration data; several sites of a layer are pooled.

    Attributes:
        input_mean: layer name to the mean of its input, (in_channels,).
        input_square: layer name to the mean square of its input, (in_channels,).
        tap_mean: layer name to the mean input that each weight meets, (groups, in_channels /
            groups, *kernel): `input_mean` with padding and stride taken into account, so that a
            change dW of the weights moves the mean output by exactly sum(tap_mean * dW).
        output_mean, output_std: layer name to statistics of its output, (out_channels,).
        edges: edge name to its range.
    """

    input_mean: Mapping[str, Tensor]
    input_square: Mapping[str, Tensor]
    tap_mean: Mapping[str, Tensor]
    output_mean: Mapping[str, Tensor]
    output_std: Mapping[str, Tensor]
    edges: Mapping[str, EdgeRange]

    def to_state(self) -> dict[str, Tensor]:
        """Everything as named tensors."""
        state = {
            f"{part}/{name}": tensor
            for part in _PARTS
            for name, tensor in getattr(self, part).items()
        }
        for name, edge in self.edges.items():
            numbers = [edge.minimum, edge.maximum, edge.mean, edge.limit]
            state[f"range/{name}"] = torch.tensor(numbers, dtype=torch.float64)
            state[f"histogram/{name}"] = edge.histogram
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Inverse of `to_state`."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "range", "histogram")}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        edges = {}
        for name, numbers in parts["range"].items():
            low, high, mean, limit = numbers.tolist()
            edges[name] = EdgeRange(low, high, mean, limit, parts["histogram"][name])
        means, squares, taps, out_means, out_stds = (parts[part] for part in _PARTS)
        return cls(means, squares, taps, out_means, out_stds, edges)


_PARTS = ("input_mean", "input_square", "tap_mean", "output_mean", "output_std")


def calibrate(
    graph: Graph,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    *,
    edges: Mapping[str, int] | None = None,
) -> Calibration:
    """Run the float network once over `batches` and collect its statistics.

    No value outlives its use in the graph, so memory stays that of one forward pass.

    Args:
        graph: the folded network.
        params: its float parameters.
        batches: (inputs, target) pairs; targets are ignored.
        edges: edge name to the node whose range is wanted; those that are not floating point
            are left out.

    Raises:
        ValueError: there is no batch.
    """
    observers = _Observers(graph, params, edges or {})
    executor = Executor(graph)
    count = 0
    for inputs, _ in batches:
        executor.run(params, tuple(inputs), transforms=observers.transforms)
        count += 1
    if not count:
        raise ValueError("calibration needs at least one batch")
    return observers.result()


class _Observers:
    """Accumulators hooked onto the nodes that are of interest."""

    def __init__(self, graph: Graph, params: Params, edges: Mapping[str, int]) -> None:
        self._graph = graph
        self._params = params
        self._layers = [x for x in graph.layers if x.searchable and x.kind != "embedding"]
        self._inputs = {x.name: ChannelSums() for x in self._layers}
        self._outputs = {x.name: ChannelSums() for x in self._layers}
        self._maps: dict[tuple[str, int], dict[tuple[int, ...], tuple[Tensor, int]]] = {}
        self._edges = {
            (name, index): _Histogram()
            for name, index in edges.items()
            if graph.nodes[index].dtype.startswith("float")
        }
        hooks: dict[int, list[Callable[[Tensor], None]]] = {}
        for layer in self._layers:
            for site in layer.sites:
                if graph.nodes[site].op != "embedding.default":
                    self._hook_layer(layer, site, hooks)
        for (_, index), histogram in self._edges.items():
            hooks.setdefault(index, []).append(histogram.add)
        self.transforms: dict[int, Transform] = {
            index: _observe(functions) for index, functions in hooks.items()
        }

    def _hook_layer(
        self, layer: Layer, site: int, hooks: dict[int, list[Callable[[Tensor], None]]]
    ) -> None:
        axis = -1 if layer.kind == "linear" else 1
        self._maps[layer.name, site] = {}

        def see_input(x: Tensor) -> None:
            self._inputs[layer.name].add(x, axis)
            maps = self._maps[layer.name, site]
            shape = tuple(x.shape[1:])
            total, count = maps.get(shape, (torch.zeros(shape, dtype=torch.float64), 0))
            maps[shape] = (total + x.sum(dim=0), count + x.shape[0])

        source = self._graph.nodes[site].args[0]
        if isinstance(source, Ref):
            hooks.setdefault(source.index, []).append(see_input)
        elif isinstance(source, ParamRef):
            see_input(self._params[source.name])
        hooks.setdefault(site, []).append(lambda y: self._outputs[layer.name].add(y, axis))

    def result(self) -> Calibration:
        return Calibration(
            input_mean={k: s.mean().float() for k, s in self._inputs.items()},
            input_square={k: s.mean_square().float() for k, s in self._inputs.items()},
            tap_mean={layer.name: self._tap_mean(layer) for layer in self._layers},
            output_mean={k: s.mean().float() for k, s in self._outputs.items()},
            output_std={k: s.std().float() for k, s in self._outputs.items()},
            edges={name: h.result() for (name, _), h in self._edges.items()},
        )

    def _tap_mean(self, layer: Layer) -> Tensor:
        total: Tensor | None = None
        positions = 0.0
        for (name, site), maps in self._maps.items():
            for map_sum, count in maps.values() if name == layer.name else ():
                gradient, n = _output_sum_gradient(self._graph.nodes[site], layer, map_sum)
                total = gradient if total is None else total + gradient
                positions += n * count
        assert total is not None
        canonical = to_canonical(layer, total / positions)
        # The same for each output of a group.
        return canonical[:: layer.out_channels // layer.groups].float().contiguous()


def _output_sum_gradient(node: Node, layer: Layer, map_sum: Tensor) -> tuple[Tensor, int]:
    """d (sum of the outputs over batch and positions) / d weight, and the number of positions.

    A layer is linear in its weight: the gradient is the sum of inputs that each weight meets.
    Padding, stride, dilation and groups are thereby the operator's own affair.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.zeros(layer.weight_shape, dtype=torch.float64, requires_grad=True)
        rest = [list(a) if isinstance(a, tuple) else a for a in node.args[3:]]
        y = implementation(node.op)(map_sum.clone()[None], weight, None, *rest)
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        return gradient, y.numel() // layer.out_channels


def _observe(functions: Sequence[Callable[[Tensor], None]]) -> Transform:
    def look(value: Tensor) -> Tensor:
        for function in functions:
            function(value)
        return value

    return look


class ChannelSums:
    """Sum and sum of squares per channel; axis 1, or -1 for a linear layer."""

    def __init__(self) -> None:
        self._sum = self._square = torch.zeros(())
        self._count = 0

    def add(self, x: Tensor, axis: int) -> None:
        # Float32 over the positions of one sample, float64 over samples: exact enough and fast.
        per_sample = x.reshape(-1, x.shape[-1], 1) if axis == -1 else x.flatten(2)
        self._sum = self._sum + per_sample.sum(dim=2).sum(dim=0, dtype=torch.float64)
        squares = per_sample.square().sum(dim=2)
        self._square = self._square + squares.sum(dim=0, dtype=torch.float64)
        self._count += x.numel() // x.shape[axis]

    def mean(self) -> Tensor:
        return self._sum / max(self._count, 1)

    def mean_square(self) -> Tensor:
        return self._square / max(self._count, 1)

    def std(self) -> Tensor:
        return (self.mean_square() - self.mean().square()).clamp_min(0).sqrt()


class _Histogram:
    """Range and histogram of one edge; the covered range doubles as values demand it."""

    def __init__(self) -> None:
        self._minimum = float("inf")
        self._maximum = -float("inf")
        self._sum = 0.0
        self._count = 0
        self._limit = 2.0**-24
        self._bins = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten().float()
        low, high = (float(v) for v in flat.aminmax())
        self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
        self._sum += float(flat.sum())
        self._count += flat.numel()
        while max(-low, high) > self._limit and self._limit < 2.0**120:
            self._double()
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_BATCH)]
        counts = torch.histc(sample, HISTOGRAM_BINS, -self._limit, self._limit)
        self._bins += counts.double()

    def _double(self) -> None:
        merged = self._bins.reshape(-1, 2).sum(dim=1)
        quarter = HISTOGRAM_BINS // 4
        self._bins = torch.nn.functional.pad(merged, (quarter, quarter))
        self._limit *= 2

    def result(self) -> EdgeRange:
        mean = self._sum / max(self._count, 1)
        return EdgeRange(self._minimum, self._maximum, mean, self._limit, self._bins)


ACTIVATION_SETTERS = ("minmax", "percentile", "mse", "aciq")


def choose_activation_quant(
    edge: EdgeRange, bit_width: int, setter: str | None = None
) -> ActivationQuant:
    """The quantizer of an edge: unsigned from 0 if nothing is negative, else signed affine.

    0 is always a level. Without a `setter`, ranges are those of the data at 8 bits and of least
    squared error below.

    Args:
        edge: the edge's calibrated range.
        bit_width: 2 to 8.
        setter: one of `ACTIVATION_SETTERS`.
    """
    setter = setter or ("minmax" if bit_width >= 8 else "mse")
    if setter not in ACTIVATION_SETTERS:
        raise ValueError(
            f"activation range setter {setter!r} is not one of {', '.join(ACTIVATION_SETTERS)}"
        )
    signed = edge.minimum < 0
    low, high = min(edge.minimum, 0.0), max(edge.maximum, 0.0)
    top = 2**bit_width - 1
    negative = round(top * -low / (high - low)) if high > low else 0  # levels below 0
    levels = Levels(-negative, top - negative, 0.0)
    if setter == "minmax" or high == low:
        values, counts = torch.tensor([[low, high]]), None
    else:
        seen = edge.histogram > 0
        values = edge.centers[None, seen].clamp(low, high)
        # what was rectified lies in the bin beside 0 and is 0
        values = torch.where(values.abs() < 2 * edge.limit / len(edge.histogram), 0.0, values)
        counts = edge.histogram[None, seen].float()
    wanted = float(RANGE_SETTERS[setter](values, levels, counts))
    scale = float(torch.tensor(wanted, dtype=torch.float32))
    zero_point = negative - 2 ** (bit_width - 1) if signed else 0
    return ActivationQuant(bit_width, signed, scale if scale > 0 else 1.0, zero_point)
