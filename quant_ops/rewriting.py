"""Arguments and shapes of a graph's nodes after channels have been removed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from quant_ops.graph import Arg, Graph, Node, Ref, map_refs
from quant_ops.index_maps import IndexMaps, varying_axes
from quant_ops.operator_kinds import pad_pairs
from quant_ops.operators import CONV, CONV_TRANSPOSE, implementation
from quant_ops.slots import Ids

Mask = NDArray[np.bool_]
_SPLITS = frozenset({"split.Tensor", "split_with_sizes.default", "chunk.default"})
_PICKS = frozenset(
    {"slice.Tensor", "flip.default", "roll.default", "channel_shuffle.default"}
    | {"constant_pad_nd.default", "pad.default"}
)
_GROUPS_POSITION = 6


def rewrite(graph: Graph, maps: IndexMaps, gone: Mask) -> Graph:
    """The graph on the remaining channels.

    Args:
        graph: the original nodes, but the layers of the smaller network.
        maps: index maps of the original nodes.
        gone: per slot whether it is removed.
    """
    rewriter = _Rewriter(graph, maps, gone)
    nodes: list[Node] = []
    new_index: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        before, after = rewriter.rewritten(index, node)
        mapped = replace(before, args=tuple(map_refs(a, new_index) for a in before.args))
        nodes.append(mapped)
        if after is not None:  # its value is that of the node just appended
            nodes.append(replace(after, args=(Ref(len(nodes) - 1), *after.args[1:])))
        new_index[index] = len(nodes) - 1
    layers = tuple(
        replace(layer, sites=tuple(new_index[s] for s in layer.sites)) for layer in graph.layers
    )
    outputs = tuple(Ref(new_index[ref.index]) for ref in graph.outputs)
    return Graph(tuple(nodes), outputs, layers, graph.param_shapes)


class _Rewriter:
    def __init__(self, graph: Graph, maps: IndexMaps, gone: Mask) -> None:
        self.graph = graph
        self.maps = maps
        self.gone = gone

    def rewritten(self, index: int, node: Node) -> tuple[Node, Node | None]:
        """The new node, and one to follow it where one operator does not suffice."""
        ids = self._ids(index)
        axis = self._cut_axis(ids)
        if node.op in CONV | CONV_TRANSPOSE and len(node.args) > _GROUPS_POSITION:
            node = _with_arg(node, _GROUPS_POSITION, self.graph.layer_at[index].groups)
        if node.op in _SPLITS:
            return self._split(index, node), None
        if axis is None or ids is None:
            if node.op in _PICKS:
                return self._pick_from_cut(index, node)
            return node, None
        kept = self._kept(ids, axis)
        smaller = _resized(node, axis, int(kept.sum()))
        if node.op in _PICKS:
            return self._picked(node, smaller, axis, kept)
        if node.op in ("reshape.default", "expand.default"):
            return _with_size(smaller, 1, axis), None
        if node.op == "unflatten.int":
            start = node.args[1]
            assert isinstance(start, int)
            return _with_size(smaller, 2, axis, axis - start % len(node.shape)), None
        return smaller, None

    def _pick_from_cut(self, index: int, node: Node) -> tuple[Node, Node | None]:
        source = node.args[0]
        assert isinstance(source, Ref)
        axis = self._cut_axis(self._ids(source.index))
        if axis is None:
            return node, None
        return self._picked(node, node, axis, np.ones(node.shape[axis], np.bool_))

    def _ids(self, index: int) -> Ids | None:
        value = self.maps.values[index]
        value = value[0] if isinstance(value, tuple) else value
        return value if isinstance(value, np.ndarray) else None

    def _cut_axis(self, ids: Ids | None) -> int | None:
        if ids is None or not self.gone[ids].any():
            return None
        (axis,) = varying_axes(ids)
        return axis

    def _kept(self, ids: Ids, axis: int) -> Mask:
        return ~self.gone[ids.reshape(-1)]

    def _split(self, index: int, node: Node) -> Node:
        source = node.args[0]
        assert isinstance(source, Ref)
        axis = self._cut_axis(self._ids(source.index))
        if axis is None:
            return node
        dim = node.args[2] if len(node.args) > 2 else 0
        parts = self.maps.values[index]
        assert isinstance(dim, int)
        assert isinstance(parts, tuple)
        if dim % len(node.shape) != axis:
            return _resized(node, axis, int(self._kept(parts[0], axis).sum()))
        full = self.graph.nodes[source.index].shape[axis]
        lengths = [len(p) for p in _split_positions(node, full)]
        sizes = []
        for ids, length in zip(parts, lengths, strict=True):
            kept = self._kept(np.broadcast_to(ids, _with_length(ids, axis, length)), axis)
            sizes.append(int(kept.sum()))
        shorter = _resized(node, axis, sizes[0])
        return replace(shorter, op="split_with_sizes.default", args=(source, tuple(sizes), axis))

    def _picked(self, node: Node, smaller: Node, axis: int, kept: Mask) -> tuple[Node, Node | None]:
        source = node.args[0]
        assert isinstance(source, Ref)
        source_ids = self._ids(source.index)
        source_shape = self.graph.nodes[source.index].shape
        assert source_ids is not None
        positions = _source_positions(node, axis, source_shape)
        if positions.size == source_shape[axis] and (positions == np.arange(positions.size)).all():
            return smaller, None
        wide = np.broadcast_to(source_ids, _with_length(source_ids, axis, source_shape[axis]))
        remaining = self._kept(wide, axis)
        compact = np.where(remaining, np.cumsum(remaining) - 1, -1)
        index = np.where(positions >= 0, compact[positions], -1)[kept].tolist()
        return _gather(node, smaller, axis, index, int(remaining.sum()))


def _source_positions(node: Node, axis: int, source_shape: Sequence[int]) -> Ids:
    """For each output position along `axis` the input position it copies; -1 for a zero."""
    size = source_shape[axis]
    if "pad" in node.op:
        amounts = node.args[1]
        assert isinstance(amounts, tuple)
        pair = pad_pairs(amounts, len(source_shape))[axis]
        return np.pad(np.arange(size), pair, constant_values=-1)
    shape = [1] * len(source_shape)
    shape[axis] = size
    numbers = torch.arange(size).reshape(shape).expand(tuple(source_shape))
    moved = implementation(node.op)(numbers, *(_plain(a) for a in node.args[1:]))
    out: Ids = moved.movedim(axis, 0).flatten(1)[:, 0].numpy()
    return out


def _gather(
    node: Node, smaller: Node, axis: int, index: list[int], n_source: int
) -> tuple[Node, Node | None]:
    """The pick of channels `index` in the shortest operator that can express it."""
    source = smaller.args[0]
    if "pad" in node.op:
        rank = len(node.shape)
        amounts = node.args[1]
        assert isinstance(amounts, tuple)
        before = next((i for i, n in enumerate(index) if n >= 0), 0)
        after = len(index) - before - n_source
        if index == [-1] * before + list(range(n_source)) + [-1] * max(after, 0):
            return _with_arg(smaller, 1, _with_pair(amounts, rank, axis, (before, after))), None
        others = _with_pair(amounts, rank, axis, (0, 0))
        if any(others):
            first = _with_arg(_resized(smaller, axis, n_source), 1, others)
            first = replace(first, name=f"{node.name}.padded")
            return first, _gathering(smaller, axis, index)
    elif node.op == "slice.Tensor":
        step = index[1] - index[0] if len(index) > 1 else 1
        if step > 0 and index == list(range(index[0], index[-1] + 1, step)):
            bounds = (index[0], index[-1] + 1)
            steps = () if step == 1 else (step,)
            return replace(smaller, args=(source, axis, *bounds, *steps)), None
    return _gathering(smaller, axis, index), None


def _gathering(node: Node, axis: int, index: list[int]) -> Node:
    args = (node.args[0], axis, tuple(index))
    return replace(node, op="bitfront.gather_channels", args=args)


def _with_pair(
    amounts: tuple[Arg, ...], rank: int, axis: int, pair: tuple[int, int]
) -> tuple[int, ...]:
    pairs = pad_pairs(amounts, rank)[rank - len(amounts) // 2 :]
    pairs[axis - rank] = pair
    return tuple(n for p in reversed(pairs) for n in p)


def _split_positions(node: Node, size: int) -> Sequence[torch.Tensor]:
    parts: Sequence[torch.Tensor] = implementation(node.op)(
        torch.arange(size), _plain(node.args[1]), 0
    )
    return parts


def _plain(arg: Arg) -> object:
    return [_plain(a) for a in arg] if isinstance(arg, tuple) else arg


def _with_length(ids: Ids, axis: int, length: int) -> tuple[int, ...]:
    return (*ids.shape[:axis], length, *ids.shape[axis + 1 :])


def _resized(node: Node, axis: int, size: int) -> Node:
    return replace(node, shape=(*node.shape[:axis], size, *node.shape[axis + 1 :]))


def _with_arg(node: Node, position: int, value: Arg) -> Node:
    return replace(node, args=(*node.args[:position], value, *node.args[position + 1 :]))


def _with_size(node: Node, position: int, axis: int, entry: int | None = None) -> Node:
    """The node with the size of `axis` written into its tuple of sizes, unless it is implied."""
    sizes = node.args[position]
    entry = axis if entry is None else entry
    assert isinstance(sizes, tuple)
    if not 0 <= entry < len(sizes) or sizes[entry] == -1:
        return node
    return _with_arg(node, position, (*sizes[:entry], node.shape[axis], *sizes[entry + 1 :]))
