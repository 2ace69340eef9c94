"""One result per graph object, forgotten with the graph."""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from quant_ops.graph import Graph

T = TypeVar("T")


def per_graph(function: Callable[[Graph], T]) -> Callable[[Graph], T]:
    """Cache a function of a graph by the graph's identity.

    Graphs compare by value; hashing all nodes of one would cost more than most cached results.
    """
    results: dict[int, T] = {}

    @wraps(function)
    def cached(graph: Graph) -> T:
        key = id(graph)
        if key not in results:
            results[key] = function(graph)
            weakref.finalize(graph, results.pop, key, None)
        return results[key]

    return cached
