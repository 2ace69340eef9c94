"""A network of steps: resources add up, ways through it do not, and early codes wait."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

from cost_models.fpga.circuit import Features
from cost_models.fpga.quantizer import crossed
from quant_ops.graph import Graph, refs_in
from quant_ops.per_graph import per_graph

NOTHING = Features()


def assembled(graph: Graph, steps: Mapping[str, Features]) -> Features:
    """What the steps of a network take together.

    Each step begins when the last of its sources is there; a source that is there earlier, such as
    the short way round a residual block, is held stage by stage until then. What enters a step is
    registered there, so that codes are registered at their own end only where they leave.

    Args:
        graph: of the network.
        steps: node name to the features of its step; nodes that are absent pass values on.
    """
    ready: list[int] = []  # per node the depth at which its value is there
    origins: list[frozenset[int]] = []  # per node the steps whose values it passes on
    read_at: dict[int, int] = {}
    for index, (node, sources) in enumerate(zip(graph.nodes, _sources(graph), strict=True)):
        step = steps.get(node.name, NOTHING)
        start = max((ready[s] for s in sources), default=0)
        before = frozenset().union(*(origins[s] for s in sources))
        if step == NOTHING:
            ready.append(start)
            origins.append(before)
            continue
        for origin in before:
            read_at[origin] = max(start, read_at.get(origin, 0))
        ready.append(start + step.depth)
        origins.append(frozenset([index]))
    ends = {index: steps[graph.nodes[index].name].end_bits for index in read_at}
    held = sum(crossed(ready[index], at) * ends[index] for index, at in read_at.items())
    leaving = frozenset().union(*(origins[ref.index] for ref in graph.outputs))
    whole = reduce(Features.beside, steps.values(), NOTHING)
    return replace(
        whole,
        code_register_bits=whole.code_register_bits + held,
        end_bits=sum(steps[graph.nodes[index].name].end_bits for index in leaving),
        depth=max((ready[ref.index] for ref in graph.outputs), default=0),
    )


@per_graph
def _sources(graph: Graph) -> list[tuple[int, ...]]:
    """Per node the nodes whose values it reads."""
    return [tuple({ref.index for ref in refs_in(node.args)}) for node in graph.nodes]
