"""Steps of an integer program that only move places or ask for shapes, run as they are."""

from collections.abc import Mapping
from typing import Any

import torch

from quant_ops.graph import Graph, Ref
from quant_ops.operators import implementation
from quant_ops.program import Call, Constant

SORTING = frozenset({"topk.default"})  # they pass values on, and which ones follows from the values


def plain_call(step: Call, values: Mapping[int, Any], graph: Graph) -> Any:
    """The value of a step between the logic; sizes are those of one sample."""
    if step.op == "sym_size.int":
        source, axis = step.args
        assert isinstance(source, Ref)
        return graph.nodes[source.index].shape[axis]  # type: ignore[index]
    return implementation(step.op)(*(plain(a, values) for a in step.args))


def plain(arg: Any, values: Mapping[int, Any]) -> Any:
    """An argument with references and constants replaced by what they stand for."""
    if isinstance(arg, Ref):
        return values[arg.index]
    if isinstance(arg, Constant):
        return torch.from_numpy(arg.array)
    if isinstance(arg, tuple):
        return [plain(item, values) for item in arg]
    return arg
