"""Index maps over a graph: for every position of every value, the slot it holds.

The map of a value is an array of slot numbers that broadcasts to the value's shape (batch of
one). Operators that only move data are run on the numbers themselves, so slices, pads,
concatenations, flattenings and shuffles need no rules of their own.
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from quant_ops.graph import Arg, Graph, Layer, Node, ParamRef, Ref, Shape, params_in, refs_in
from quant_ops.operator_kinds import (
    ALONG_ONE_AXIS,
    MOVES,
    ONE_BY_ONE,
    PADS,
    POINTWISE,
    POOLS,
    REDUCTIONS,
    SIZES,
    SUMS,
    ZERO_KEEPING,
    compressed,
    keeps_zero,
    pad_pairs,
)
from quant_ops.operators import CONV, CONV_TRANSPOSE, LAYER_OPS, LINEAR, implementation
from quant_ops.slots import OPAQUE, Ids, SlotTable

Value = Ids | tuple[Ids, ...] | int | None


@dataclass(eq=False)
class IndexMaps:
    """Slots of every value of a graph.

    Attributes:
        table: the slots.
        atoms: layer name to its output channels' slots.
        inputs: layer name to one vector of input-channel slots per site.
        values: per node its map; several for a node of several values; a number for a size.
        params: name of a float parameter that rides along to (axis, slots along it).
    """

    table: SlotTable
    atoms: dict[str, Ids]
    inputs: dict[str, list[Ids]]
    values: list[Value] = field(default_factory=list)
    params: dict[str, tuple[int, Ids]] = field(default_factory=dict)


def trace_slots(graph: Graph) -> IndexMaps:
    """The index maps of `graph`."""
    return _Tracer(graph).run()


def varying_axes(ids: Ids) -> list[int]:
    """The axes along which a map's slots differ."""
    return [axis for axis, size in enumerate(ids.shape) if size > 1]


class _Tracer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.table = SlotTable()
        atoms = {layer.name: self.table.new_atoms(layer.out_channels) for layer in graph.layers}
        self.maps = IndexMaps(self.table, atoms, {})
        self.shapes = dict(graph.param_shapes)
        self.readers: dict[str, int] = {}
        self.rides: dict[str, int] = {}
        for node in graph.nodes:
            for name in set(params_in(node.args)):
                self.readers[name] = self.readers.get(name, 0) + 1

    def run(self) -> IndexMaps:
        for index, node in enumerate(self.graph.nodes):
            value = self._value(index, node)
            self.maps.values.append(value)
            for ids in value if isinstance(value, tuple) else (value,):
                if isinstance(ids, np.ndarray) and len(varying_axes(ids)) > 1:
                    self.table.pin(ids)
        for ref in self.graph.outputs:
            self._pin_value(ref)
        for layer in self.graph.layers:
            self._tie_layer(layer)
        for name, (_, vector) in self.maps.params.items():
            if self.readers[name] > self.rides[name]:  # something else reads all of it
                self.table.pin(vector)
        return self.maps

    # one operator

    def _value(self, index: int, node: Node) -> Value:
        if node.op in LAYER_OPS:
            return self._layer(index, node)
        rule = next((rule for ops, rule in self._rules if node.op in ops), self._opaque)
        return rule(node)

    @cached_property
    def _rules(self) -> tuple[tuple[Container[str], Callable[[Node], Value]], ...]:
        return (
            (SIZES, self._size),
            (("getitem",), self._item),
            (MOVES, self._move),
            (SUMS | {"mul.Tensor", "div.Tensor"}, self._binary),
            (ZERO_KEEPING | POINTWISE, self._unary),
            (PADS, self._pad),
            (("pixel_shuffle.default",), self._pixel_shuffle),
            (POOLS, self._pool),
            (REDUCTIONS, self._reduce),
            (("prelu.default", "bitfront.channel_affine"), self._with_vectors),
        )

    def _unary(self, node: Node) -> Ids:
        ids = self._ids(node.args[0])
        keeps = node.op in ZERO_KEEPING or keeps_zero(node)
        return ids if keeps else self.table.shadow(ids)

    def _opaque(self, node: Node) -> Ids:
        for ref in refs_in(node.args):
            self._pin_value(ref)
        return np.full((1,) * len(node.shape), OPAQUE, np.int64)

    def _ids(self, arg: Arg) -> Ids:
        assert isinstance(arg, Ref)
        value = self.maps.values[arg.index]
        assert isinstance(value, np.ndarray)
        return value

    def _pin_value(self, ref: Ref) -> None:
        value = self.maps.values[ref.index]
        for ids in value if isinstance(value, tuple) else (value,):
            if isinstance(ids, np.ndarray):
                self.table.pin(ids)

    def _size(self, node: Node) -> int:
        if node.op == "sym_size.int":
            source, axis = node.args
            assert isinstance(source, Ref)
            assert isinstance(axis, int)
            ids = self.maps.values[source.index]
            if isinstance(ids, np.ndarray) and ids.shape[axis] > 1:
                self.table.pin(ids)
            return self.graph.nodes[source.index].shape[axis]
        return int(implementation(node.op)(*(self._plain(arg, {}) for arg in node.args)))

    def _plain(self, arg: Arg, shapes: Mapping[int, Shape]) -> object:
        """The argument with numbers for sizes and maps, spread to `shapes`, for values."""
        if isinstance(arg, Ref):
            value = self.maps.values[arg.index]
            if not isinstance(value, np.ndarray):
                return value
            return torch.from_numpy(np.broadcast_to(value, shapes[arg.index]).copy())
        if isinstance(arg, tuple):
            return [self._plain(item, shapes) for item in arg]
        return arg

    def _shapes_to_move(self, node: Node) -> dict[int, Shape]:
        """The shapes that maps must be spread to before the operator can move them."""
        full = {ref.index: self.graph.nodes[ref.index].shape for ref in refs_in(node.args)}
        if node.op not in ALONG_ONE_AXIS:
            return full
        position, default = ALONG_ONE_AXIS[node.op]
        axis = node.args[position] if len(node.args) > position else default
        assert isinstance(axis, int)
        axis %= len(node.shape)
        heads = [self.maps.values[i] for i in full]
        others = np.broadcast_shapes(
            *(ids.take([0], axis).shape for ids in heads if isinstance(ids, np.ndarray))
        )
        return {
            i: (*others[:axis], shape[axis], *others[axis + 1 :])
            for i, shape in full.items()
            if shape
        }

    def _item(self, node: Node) -> Value:
        source, number = node.args
        assert isinstance(source, Ref)
        assert isinstance(number, int)
        value = self.maps.values[source.index]
        return value[number] if isinstance(value, tuple) else self._opaque(node)

    def _layer(self, index: int, node: Node) -> Ids:
        layer = self.graph.layer_at.get(index)
        if layer is None or node.op not in LINEAR | CONV | CONV_TRANSPOSE:
            return self._opaque(node)
        source = node.args[0]
        assert isinstance(source, Ref)
        rank = len(node.shape)
        axis = rank - 1 if node.op in LINEAR else rank - len(layer.weight_shape) + 1
        size = self.graph.nodes[source.index].shape[axis]
        self.maps.inputs.setdefault(layer.name, []).append(
            self._along(self._ids(source), axis, size)
        )
        shape = [1] * rank
        shape[axis] = layer.out_channels
        return self.maps.atoms[layer.name].reshape(shape)

    def _along(self, ids: Ids, axis: int, size: int) -> Ids:
        if ids.size == ids.shape[axis]:
            return np.broadcast_to(ids.reshape(-1), size).copy()
        rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
        return np.broadcast_to([self.table.merged(row) for row in rows], size).copy()

    def _move(self, node: Node) -> Value:
        if any(True for _ in params_in(node.args)):
            return self._opaque(node)
        if node.op in ONE_BY_ONE and self._picks_channels(node):
            self._pin_value(next(refs_in(node.args)))
        if node.op in ("flip.default", "roll.default") and len(self._axes_of(node)) > 1:
            self._pin_value(next(refs_in(node.args)))
        shapes = self._shapes_to_move(node)
        moved = implementation(node.op)(*(self._plain(arg, shapes) for arg in node.args))
        parts = (moved,) if isinstance(moved, Tensor) else moved
        if not all(part.numel() for part in parts):
            return self._opaque(node)
        if not isinstance(moved, Tensor):
            return tuple(compressed(part.numpy()) for part in moved)
        ids = compressed(moved.numpy())
        sizes = node.args[-1] if isinstance(node.args[-1], tuple) else ()
        if node.op in ("reshape.default", "expand.default") and any(
            isinstance(size, Ref) and ids.shape[axis] > 1 for axis, size in enumerate(sizes)
        ):
            return self._opaque(node)  # an axis that mixes batch and channels
        return ids

    def _axes_of(self, node: Node) -> tuple[Arg, ...]:
        axes = node.args[1] if len(node.args) > 1 else 0
        return axes if isinstance(axes, tuple) else (axes,)

    def _picks_channels(self, node: Node) -> bool:
        ids = self._ids(node.args[0])
        return any(isinstance(axis, int) and ids.shape[axis] > 1 for axis in self._axes_of(node))

    def _binary(self, node: Node) -> Ids:
        left, right = (self._tensor_or_number(arg) for arg in node.args[:2])
        if isinstance(left, Ref) and isinstance(right, Ref):
            if node.op == "div.Tensor":
                return self._opaque(node)
            a, b = self._aligned(left, node), self._aligned(right, node)
            return self.table.product(a, b) if node.op == "mul.Tensor" else self.table.sum(a, b)
        source = left if isinstance(left, Ref) else right
        other = right if isinstance(left, Ref) else left
        if not isinstance(source, Ref) or (node.op == "div.Tensor" and source is right):
            return self._opaque(node)
        ids = self._aligned(source, node)
        if isinstance(other, ParamRef):
            shape = self.shapes[other.name]
            padded = (1,) * (len(node.shape) - len(shape)) + shape
            self._ride(ids, other.name, padded)
        keeps = node.op in ("mul.Tensor", "div.Tensor")
        return ids if keeps else self.table.shadow(ids)

    def _tensor_or_number(self, arg: Arg) -> Arg:
        value = self.maps.values[arg.index] if isinstance(arg, Ref) else None
        return value if isinstance(value, int) else arg

    def _aligned(self, ref: Ref, node: Node) -> Ids:
        ids = self._ids(ref)
        return ids.reshape((1,) * (len(node.shape) - ids.ndim) + ids.shape)

    def _ride(self, ids: Ids, name: str, padded: Shape) -> None:
        axes = varying_axes(ids)
        if math.prod(padded) == 1 or not axes or (len(axes) == 1 and padded[axes[0]] == 1):
            return
        if len(axes) > 1:
            self.table.pin(ids)
            return
        self._ride_along(name, axes[0] - (len(padded) - len(self.shapes[name])), ids.reshape(-1))

    def _with_vectors(self, node: Node) -> Ids:
        source = node.args[0]
        assert isinstance(source, Ref)
        ids = self._ids(source)
        for name in params_in(node.args):
            axis = node.args[3] if len(node.args) > 3 else 1
            assert isinstance(axis, int)
            padded = [1] * max(ids.ndim, 1)
            if math.prod(self.shapes[name]) > 1:
                padded[axis] = math.prod(self.shapes[name])
            if varying_axes(ids) == [axis] and padded[axis] > 1:
                self._ride_along(name, 0, ids.reshape(-1))
        return ids if node.op == "prelu.default" else self.table.shadow(ids)

    def _ride_along(self, name: str, axis: int, vector: Ids) -> None:
        known = self.maps.params.setdefault(name, (axis, vector))
        self.rides[name] = self.rides.get(name, 0) + 1
        if known[0] != axis or known[1].size != vector.size:
            self.table.pin(vector)
            self.table.pin(known[1])
        else:
            self.table.tie(known[1], vector)

    def _pad(self, node: Node) -> Ids:
        ids = self._ids(node.args[0]).copy()
        amounts = node.args[1]
        assert isinstance(amounts, tuple)
        if any(isinstance(amount, Ref) for amount in amounts):
            return self._opaque(node)
        constant = node.op == "constant_pad_nd.default" or (
            node.op == "pad.default" and (len(node.args) < 3 or node.args[2] == "constant")
        )
        value = node.args[-1] if constant and len(node.args) > 2 else 0
        fills_zero = value in (0, None, "constant")
        pairs = pad_pairs(amounts, ids.ndim)
        changed = [axis for axis in varying_axes(ids) if pairs[axis] != (0, 0)]
        if constant and not fills_zero:
            return self._opaque(node)
        if not changed:
            return ids
        if not constant or any(n < 0 for axis in changed for n in pairs[axis]):
            return self._opaque(node)
        for axis in changed:
            ids = np.pad(ids, [p if i == axis else (0, 0) for i, p in enumerate(pairs)],
                         constant_values=-1)  # fmt: skip
        ids[ids < 0] = self.table.new_zeros(int((ids < 0).sum()))
        return ids

    def _pixel_shuffle(self, node: Node) -> Ids:
        ids, factor = self._ids(node.args[0]), node.args[1]
        assert isinstance(factor, int)
        axis = ids.ndim - 3
        if varying_axes(ids) != [axis]:
            return self._opaque(node)
        blocks = ids.reshape(-1, factor * factor)
        out = blocks[:, 0]
        for column in blocks.T[1:]:
            out = self.table.sum(out, column)
        return out.reshape((*ids.shape[:axis], -1, 1, 1))

    def _pool(self, node: Node) -> Value:
        ids = self._ids(node.args[0])
        n_spatial = int(next(c for c in node.op if c.isdigit()))
        if any(size > 1 for size in ids.shape[ids.ndim - n_spatial :]):
            return self._opaque(node)
        two_values = "with_indices" in node.op or node.op.startswith("adaptive_max")
        if two_values:
            return ids, self.table.shadow(ids)
        return ids

    def _reduce(self, node: Node) -> Ids:
        ids = self._ids(node.args[0])
        axes = node.args[1] if len(node.args) > 1 else None
        axes = (axes,) if isinstance(axes, int) else axes
        keep = bool(node.args[2]) if len(node.args) > 2 else False
        if not isinstance(axes, tuple) or not axes:
            return self._opaque(node)
        reduced = tuple(a % ids.ndim for a in axes if isinstance(a, int))
        if any(ids.shape[a] > 1 for a in reduced):
            return self._opaque(node)
        return ids if keep else ids.squeeze(reduced)

    # ties of a layer

    def _tie_layer(self, layer: Layer) -> None:
        inputs = self.maps.inputs.get(layer.name, [])
        atoms = self.maps.atoms[layer.name]
        ops = {self.graph.nodes[site].op for site in layer.sites}
        weight_only = self.readers[layer.weight] == len(layer.sites) == len(inputs)
        same = ops <= LINEAR or ops <= CONV or ops <= CONV_TRANSPOSE
        if not (weight_only and same and len({v.size for v in inputs}) == 1):
            self.table.pin(atoms)
            for vector in inputs:
                self.table.pin(vector)
            return
        for vector in inputs:
            self.table.pin_nonzero(vector)
            self.table.tie(inputs[0], vector)
        if layer.groups > 1:
            for ins, outs in zip(
                np.split(inputs[0], layer.groups), np.split(atoms, layer.groups), strict=True
            ):
                self.table.tie_all([*ins, *outs])
