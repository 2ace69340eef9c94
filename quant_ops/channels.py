"""Which channels are zero, which inputs are dead, which channels go only together.

A channel of width 0 is exactly 0 as its consumers see it. What follows from that for the rest
of a network is read from index maps (`quant_ops.index_maps`), never from tensor values.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from quant_ops.dual import main_of
from quant_ops.graph import Graph, Ref
from quant_ops.index_maps import IndexMaps, trace_slots, varying_axes
from quant_ops.operator_kinds import MOVES, POOLS, REDUCTIONS, ZERO_KEEPING
from quant_ops.operators import LAYER_OPS
from quant_ops.per_graph import per_graph
from quant_ops.slots import Ids

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Tie:
    """Output channels that can only be removed together.

    Attributes:
        channels: (layer, output channel), in execution order.
        removable: whether they leave the network when all have width 0; not so where an input,
            an output, or an operator that mixes channels needs them.
    """

    channels: tuple[tuple[str, int], ...]
    removable: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers concerned, in execution order."""
        return tuple(dict.fromkeys(name for name, _ in self.channels))


@dataclass(frozen=True, eq=False)
class ChannelAnalysis:
    """Index maps of a graph in the form that questions about a candidate need.

    Attributes:
        maps: slots of every value.
        component: per slot, the number of the set it can only be removed with; 0 is never removed.
        n_components: how many there are.
        atom_range: layer name to the slots of its output channels, first and last + 1.
        value_vectors: components along the channel axis of every distinct value, one after the
            other, and where each starts.
        layer_inputs: layer name to the slots of its input channels, one vector per site.
    """

    maps: IndexMaps
    component: Ids
    n_components: int
    atom_range: dict[str, tuple[int, int]]
    value_vectors: tuple[Ids, Ids]
    layer_inputs: dict[str, tuple[Ids, ...]]
    atom_lists: tuple[Ids, Ids, Ids]

    def zero_slots(self, zero_atoms: Mask) -> Mask:
        """For every slot whether it is exactly 0. zero_atoms: (atoms + 1,), entry 0 unused."""
        slots, flat, starts = self.atom_lists
        zero = np.zeros(self.component.size, np.bool_)
        zero[slots] = np.logical_and.reduceat(np.append(zero_atoms[flat], True), starts)
        return zero


@per_graph
def analyse(graph: Graph) -> ChannelAnalysis:
    """The channel analysis of a graph; computed once per graph object."""
    maps = trace_slots(graph)
    component = maps.table.components()
    return ChannelAnalysis(
        maps=maps,
        component=component,
        n_components=int(component.max(initial=0)) + 1,
        atom_range={n: (int(a[0]), int(a[-1]) + 1) for n, a in maps.atoms.items()},
        value_vectors=_value_vectors(maps, component),
        layer_inputs={name: tuple(v) for name, v in maps.inputs.items()},
        atom_lists=_atom_lists(maps),
    )


def zero_channels(graph: Graph, candidate: Candidate) -> dict[str, frozenset[int]]:
    """Layer name to its output channels of width 0, for the layers that have any."""
    out = {}
    for name, quant in candidate.layers:
        if 0 in quant.bit_widths:
            widths = quant.per_channel(graph.layer_of[name].out_channels)
            out[name] = frozenset(i for i, width in enumerate(widths) if width == 0)
    return out


def zero_atoms(graph: Graph, candidate: Candidate) -> Mask | None:
    """For every output channel of every layer whether its width is 0; None if none is.

    (channels of all layers + 1,): layers in order from entry 1 on, entry 0 unused.
    """
    if not any(0 in quant.bit_widths for _, quant in candidate.layers):
        return None
    ranges = analyse(graph).atom_range
    zero = np.zeros(1 + sum(layer.out_channels for layer in graph.layers), np.bool_)
    for name, quant in candidate.layers:
        if 0 in quant.bit_widths:
            start, stop = ranges[name]
            zero[start:stop] = np.asarray(quant.bit_widths) == 0
    return zero


def live_inputs(graph: Graph, candidate: Candidate) -> dict[str, Mask]:
    """Layer name to a mask (in_channels,): False where that input channel is exactly 0.

    Input channels are the entries of the channel axis that the operator sees: for a linear
    layer after a flattening, positions of the flattened axis. A layer that is called several
    times has a dead input only where it is dead in every call.
    """
    analysis = analyse(graph)
    zero = zero_atoms(graph, candidate)
    if zero is None:
        return {n: np.ones(v[0].size, np.bool_) for n, v in analysis.layer_inputs.items()}
    dead = analysis.zero_slots(zero)
    return {
        name: ~np.logical_and.reduce([dead[vector] for vector in vectors])
        for name, vectors in analysis.layer_inputs.items()
    }


def tied_channels(graph: Graph) -> tuple[Tie, ...]:
    """Every set of output channels that go together; those never removed come as one set."""
    analysis = analyse(graph)
    sets: dict[int, list[tuple[str, int]]] = {}
    for layer in graph.layers:
        start, stop = analysis.atom_range[layer.name]
        for channel, number in enumerate(analysis.component[start:stop].tolist()):
            sets.setdefault(number, []).append((layer.name, channel))
    return tuple(Tie(tuple(channels), number > 0) for number, channels in sets.items())


@per_graph
def bypassed_layers(graph: Graph) -> frozenset[str]:
    """Layers that may be 0 as a whole, all of them at once: an addition bypasses each.

    What such a layer computes ends in an addition, through operators that keep zeros or through
    other layers, and every output still depends on the inputs when all of them are cut out. Of
    two branches that meet in one addition, the one with the largest layer is chosen; of a layer
    and its residual, the residual.
    """
    residual = main_of(graph)
    absorbed = _absorbed_nodes(graph)
    cut: set[int] = set()
    chosen = []
    for layer in sorted(
        graph.searchable_layers, key=lambda x: (x.name not in residual, -x.n_weights)
    ):
        sites = set(layer.sites)
        if layer.kind != "embedding" and sites <= absorbed and _connected(graph, cut | sites):
            cut |= sites
            chosen.append(layer.name)
    return frozenset(chosen)


def _absorbed_nodes(graph: Graph) -> set[int]:
    """Nodes whose values reach the outputs only through additions."""
    outputs = {ref.index for ref in graph.outputs}
    absorbed: set[int] = set()
    for index in reversed(range(len(graph.nodes))):
        users = graph.consumers[index]
        if index not in outputs and users and all(_absorbs(graph, u, absorbed) for u in users):
            absorbed.add(index)
    return absorbed


def _absorbs(graph: Graph, user: int, absorbed: set[int]) -> bool:
    node = graph.nodes[user]
    n_values = sum(isinstance(arg, Ref) for arg in node.args[:2])
    if node.op in ("add.Tensor", "sub.Tensor") and n_values == 2:
        return True
    passes = (
        node.op in LAYER_OPS | ZERO_KEEPING | REDUCTIONS | POOLS | (MOVES - {"cat.default"})
        or node.op in ("mul.Tensor", "div.Tensor", "prelu.default", "getitem", "hardtanh.default")
        or node.op == "constant_pad_nd.default"
    )
    return passes and user in absorbed


def _connected(graph: Graph, cut: set[int]) -> bool:
    """Whether every output depends on an input without the nodes in `cut`."""
    reached: set[int] = set(graph.input_nodes)
    for index, node in enumerate(graph.nodes):
        if index not in cut and node.dtype and index not in reached:
            sources = {ref.index for ref in _values_in(graph, node.args)}
            if sources & reached:
                reached.add(index)
    return all(ref.index in reached for ref in graph.outputs)


def _values_in(graph: Graph, args: Iterable[object]) -> Iterable[Ref]:
    for arg in args:
        if isinstance(arg, Ref) and graph.nodes[arg.index].dtype:
            yield arg
        elif isinstance(arg, tuple):
            yield from _values_in(graph, arg)


def _value_vectors(maps: IndexMaps, component: Ids) -> tuple[Ids, Ids]:
    seen: dict[bytes, Ids] = {}
    for value in maps.values:
        for ids in value if isinstance(value, tuple) else (value,):
            if isinstance(ids, np.ndarray) and len(varying_axes(ids)) <= 1:
                vector = component[ids.reshape(-1)]
                if vector.all():
                    seen.setdefault(vector.tobytes(), vector)
    vectors = list(seen.values())
    starts = np.cumsum([0] + [v.size for v in vectors])[:-1].astype(np.int64)
    return (np.concatenate(vectors) if vectors else np.zeros(0, np.int64)), starts


def _atom_lists(maps: IndexMaps) -> tuple[Ids, Ids, Ids]:
    """Slots that can be 0; their atoms one after the other; where each slot's start.

    A slot without atoms reads the closing entry, which is always true.
    """
    known = [(slot, atoms) for slot, atoms in enumerate(maps.table.atoms_of) if atoms is not None]
    n_flat = sum(len(atoms) for _, atoms in known)
    known.sort(key=lambda item: not item[1])  # empty lists last: they start at the closing entry
    flat = np.array([a for _, atoms in known for a in sorted(atoms)], np.int64)
    starts = np.cumsum([0] + [len(atoms) for _, atoms in known])[:-1].astype(np.int64)
    assert flat.size == n_flat
    return np.array([slot for slot, _ in known], np.int64), flat, starts
