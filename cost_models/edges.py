"""Which activation width a value has."""

from collections.abc import Mapping

from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.graph import Graph, Ref
from quant_ops.operator_kinds import MOVES, PADS
from quant_ops.per_graph import per_graph

ACTIVATIONS = frozenset({"relu.default", "relu6.default", "hardtanh.default", "clamp.default"})
_ONE_SOURCE = (MOVES - {"cat.default", "stack.default"}) | PADS | ACTIVATIONS
_ONE_SOURCE |= {"getitem", "max_pool1d.default", "max_pool2d.default", "max_pool3d.default"}


@per_graph
def edge_names(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """For each node the names its value's edge may have, nearest first.

    Operators that only move values, take a maximum or clip keep the width of their source.
    """
    names: list[tuple[str, ...]] = []
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        upstream = names[source.index] if node.op in _ONE_SOURCE and isinstance(source, Ref) else ()
        names.append((node.name, *upstream))
    return tuple(names)


def width_of(names: tuple[str, ...], activation_bits: Mapping[str, int]) -> int:
    """The width of the first of these edges that has one, else that of a float.

    >>> width_of(("relu", "conv"), {"conv": 4}), width_of(("input",), {})
    (4, 32)
    """
    return next((activation_bits[name] for name in names if name in activation_bits), FLOAT_BITS)
