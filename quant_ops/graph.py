"""The traced network: operators of a closed list in execution order, and its layers.

A `Graph` holds no tensors. Parameters live beside it in a mapping from parameter name to
tensor, so that one graph serves the float model and every quantized version of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ref:
    """The value produced by node number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class ParamRef:
    """The parameter tensor called `name`."""

    name: str


Arg: TypeAlias = "bool | int | float | str | Ref | ParamRef | tuple[Arg, ...] | None"
Shape: TypeAlias = tuple[int, ...]
Params: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call.

    `shape` is that of its value for a batch of one (several values: of the first; a size: ()).
    `dtype` is torch's name of the value's type without the prefix, "" for a size.
    """

    op: str
    args: tuple[Arg, ...]
    name: str
    shape: Shape
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight tensor and the nodes that use it.

    Canonical weight form is (out_channels, in_channels / groups, *kernel), whatever the operator
    stores; see `quant_ops.layout`. An embedding's out channels are its rows.
    """

    name: str
    kind: str  # conv, conv_transpose, linear, embedding; other: weight of an operator kept in float
    weight: str
    bias: str | None
    sites: tuple[int, ...]
    weight_shape: Shape
    out_channels: int
    groups: int
    macs: int  # for one sample, over all sites
    searchable: bool = True
    reason: str = ""  # why it is kept in float, empty when searchable

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.weight_shape:
            count *= size
        return count

    @property
    def weights_per_channel(self) -> int:
        """Number of weights of one output channel."""
        return self.n_weights // self.out_channels


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order. Nodes whose op is "input" come first, in argument order.

    `param_dtypes` names the types of the parameters that are not float32.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Ref, ...]
    layers: tuple[Layer, ...]
    param_shapes: tuple[tuple[str, Shape], ...] = field(default=())
    param_dtypes: tuple[tuple[str, str], ...] = field(default=())

    @cached_property
    def layer_of(self) -> dict[str, Layer]:
        """Layer name to layer."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def layer_at(self) -> dict[int, Layer]:
        """Node index to the layer whose weight that node uses."""
        return {site: layer for layer in self.layers for site in layer.sites}

    @cached_property
    def searchable_layers(self) -> tuple[Layer, ...]:
        """Layers whose bit width may be chosen, in execution order."""
        return tuple(layer for layer in self.layers if layer.searchable)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each node the indices of the nodes that read its value."""
        users: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for source in sorted({ref.index for ref in refs_in(node.args)}):
                users[source].append(index)
        return tuple(tuple(u) for u in users)

    @cached_property
    def input_nodes(self) -> tuple[int, ...]:
        """Indices of the input nodes."""
        return tuple(i for i, node in enumerate(self.nodes) if node.op == "input")

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Node name to node index."""
        return {node.name: index for index, node in enumerate(self.nodes)}


def refs_in(arg: Arg) -> Iterator[Ref]:
    """Every value reference inside an argument, nested ones included."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_in(item)


def params_in(arg: Arg) -> Iterator[str]:
    """Every parameter name inside an argument, nested ones included."""
    if isinstance(arg, ParamRef):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from params_in(item)


def map_refs(arg: Arg, index_map: Mapping[int, int]) -> Arg:
    """The argument with every value reference renumbered."""
    if isinstance(arg, Ref):
        return Ref(index_map[arg.index])
    if isinstance(arg, tuple):
        return tuple(map_refs(item, index_map) for item in arg)
    return arg
