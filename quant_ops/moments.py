"""Second moments of what each weight meets: the Hessian of a layer's squared output error."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant_ops.executor import Executor, Transform
from quant_ops.graph import Graph, Layer, Node, Params, Ref
from quant_ops.layout import from_canonical
from quant_ops.operators import implementation

ROWS = 1 << 17  # patches per layer: many times the number of weights that meet in one output
_CHUNK = 1 << 22  # numbers in one matrix of patches


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of the input patches x of one layer; a patch is what one output is computed from.

    Attributes:
        covariance: (groups, n, n), n weights per output channel, float64: of the error that is
            left when a bias absorbs its mean.
        mean: (groups, n) mean of x, float64.
    """

    covariance: Tensor
    mean: Tensor

    @property
    def second(self) -> Tensor:
        """(groups, n, n) mean of x x^T."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def collect_moments(
    graph: Graph,
    params: Params,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    *,
    transforms: Mapping[int, Transform] | None = None,
    rows: int = ROWS,
) -> dict[str, InputMoments]:
    """Layer name to moments, for every searchable layer but embeddings; one pass.

    Args:
        graph: the network.
        params: of the float or the quantized network.
        batches: (inputs, target) pairs, all of them in memory; targets are ignored.
        transforms: node index to fake quantizer.
        rows: about how many patches of a layer are looked at, taken from the first samples of
            every batch.

    Raises:
        ValueError: there is no batch.
    """
    pairs = [tuple(inputs) for inputs, _ in batches]
    if not pairs:
        raise ValueError("second moments need at least one batch")
    sums = {
        layer.name: _Sums(layer, rows // len(pairs))
        for layer in graph.searchable_layers
        if layer.kind != "embedding"
    }
    hooks: dict[int, list[tuple[Node, _Sums]]] = {}
    for layer in graph.searchable_layers:
        for site in layer.sites if layer.name in sums else ():
            source = graph.nodes[site].args[0]
            if isinstance(source, Ref):
                hooks.setdefault(source.index, []).append((graph.nodes[site], sums[layer.name]))
    watched = {**(transforms or {})}
    for index, readers in hooks.items():
        watched[index] = _watch((transforms or {}).get(index), readers)
    executor = Executor(graph)
    for inputs in pairs:
        executor.run(params, inputs, transforms=watched)
    return {name: found.result() for name, found in sums.items() if found.count}


def _watch(first: Transform | None, readers: Sequence[tuple[Node, "_Sums"]]) -> Transform:
    def look(value: Tensor) -> Tensor:
        value = value if first is None else first(value)
        for node, sums in readers:
            sums.add(node, value)
        return value

    return look


class _Sums:
    """Sums about the mean of the first patches, so that float32 products are exact enough."""

    def __init__(self, layer: Layer, rows_per_batch: int) -> None:
        n = layer.weights_per_channel
        self._layer = layer
        self._rows = rows_per_batch
        self._second = torch.zeros(layer.groups, n, n, dtype=torch.float64)
        self._mean = torch.zeros(layer.groups, n, dtype=torch.float64)
        self._origin: Tensor | None = None
        self.count = 0

    def add(self, node: Node, x: Tensor) -> None:
        positions = 1
        for size in node.shape[1:]:
            positions *= size
        positions = max(1, positions // self._layer.out_channels)
        n_samples = max(1, min(x.shape[0], self._rows // positions))
        width = positions * self._layer.groups * self._layer.weights_per_channel
        step = max(1, _CHUNK // width)
        for start in range(0, n_samples, step):
            found = input_patches(node, self._layer, x[start : min(start + step, n_samples)])
            if self._origin is None:
                self._origin = found.mean(dim=1, keepdim=True)
            found = found - self._origin
            self._second += found.transpose(1, 2) @ found
            self._mean += found.sum(dim=1)
            self.count += found.shape[1]

    def result(self) -> InputMoments:
        assert self._origin is not None
        mean = self._mean / self.count
        covariance = self._second / self.count - mean[:, :, None] * mean[:, None, :]
        return InputMoments(covariance, mean + self._origin[:, 0])


def input_patches(node: Node, layer: Layer, x: Tensor) -> Tensor:
    """(groups, outputs, n): for every output position the inputs that the n weights meet.

    In the order of canonical weights; padding counts as 0. For any layer but an embedding.
    """
    n = layer.weights_per_channel
    if layer.kind == "linear":
        return x.reshape(1, -1, n)
    if node.op == "conv2d.default":
        geometry = [*node.args[3:6], *((1, 1), (0, 0), (1, 1))[len(node.args[3:6]) :]]
        stride, padding, dilation = (_pair(g) for g in geometry)
        columns = functional.unfold(x, layer.weight_shape[2:], dilation, padding, stride)
        return columns.reshape(x.shape[0], layer.groups, n, -1).permute(1, 0, 3, 2).flatten(1, 2)
    # The operator itself says which inputs meet: give it weights that pick one each.
    in_per_group, *kernel = _canonical_shape(layer)
    picking = torch.eye(n, dtype=x.dtype).reshape(n, in_per_group, *kernel)
    many = replace(layer, out_channels=layer.groups * n)
    weight = from_canonical(many, picking.repeat(layer.groups, *[1] * (picking.dim() - 1)))
    rest = [list(a) if isinstance(a, tuple) else a for a in node.args[3:]]
    y: Tensor = implementation(node.op)(x, weight.contiguous(), None, *rest)
    return y.reshape(x.shape[0], layer.groups, n, -1).permute(1, 0, 3, 2).flatten(1, 2)


def _canonical_shape(layer: Layer) -> tuple[int, ...]:
    shape = layer.weight_shape
    if layer.kind == "conv_transpose":
        return (shape[0] // layer.groups, *shape[2:])
    return shape[1:]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    numbers = tuple(value)
    return (numbers[0], numbers[-1])
