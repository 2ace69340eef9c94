"""Steps of an integer program that only move places or ask for shapes, run as they are."""

from collections.abc import Mapping
from typing import Any

import torch

from quant_ops.graph import Graph, Ref
from quant_ops.operators import implementation
from quant_ops.program import Call, Constant, StepArg, refs_in_args

AS_SHAPED = frozenset({"expand_as.default", "view_as.default"})  # ask for a shape alone
SORTING = frozenset({"topk.default"})  # they pass values on, and which ones follows from the values


def plain_call(step: Call, values: Mapping[int, Any], graph: Graph) -> Any:
    """The value of a step between the logic; sizes are those of one sample."""
    if step.op == "sym_size.int":
        source, axis = step.args
        assert isinstance(source, Ref)
        return graph.nodes[source.index].shape[axis]  # type: ignore[index]
    return implementation(step.op)(*(plain(a, values) for a in step.args))


def plain_args(
    op: str, args: tuple[StepArg, ...], known: Mapping[int, Any], graph: Graph
) -> list[Any] | None:
    """Arguments of an operator; zeros for a value whose shape alone is asked for.

    None where it reads numbers that are not `known` before the program runs.
    """
    computed = {ref.index for ref in refs_in_args(args)} - known.keys()
    if computed and op not in AS_SHAPED:
        return None
    shapes = {number: torch.zeros(graph.nodes[number].shape) for number in computed}
    return [plain(arg, {**known, **shapes}) for arg in args]


def plain(arg: Any, values: Mapping[int, Any]) -> Any:
    """An argument with references and constants replaced by what they stand for."""
    if isinstance(arg, Ref):
        return values[arg.index]
    if isinstance(arg, Constant):
        return torch.from_numpy(arg.array)
    if isinstance(arg, tuple):
        return [plain(item, values) for item in arg]
    return arg
