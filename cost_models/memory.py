"""Memory while a network runs: the arena of its values, and what a microcontroller needs."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from cost_models.arena import ArenaRules, Scratch, plan_arena
from cost_models.base import CostModel, Kind
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate
from quant_ops.dual import without_unused
from quant_ops.errors import UsageError
from quant_ops.graph import Graph
from quant_ops.packed_size import layer_term, size_bytes

Weights = Literal["flash", "streamed", "resident"]
WEIGHTS: tuple[Weights, ...] = ("flash", "streamed", "resident")


class PeakMemory(CostModel):
    """Length of the static arena that holds all values of one sample, as `plan_arena` lays it out.

    A value takes 4 bytes per element, or its activation width in bits, rounded up to whole bytes
    per tensor. Views share the memory of their source, an activation function is computed with
    the layer or addition before it, and an elementwise operator overwrites an operand of at least
    its own size that nobody reads later. Weights, copies that a strided layout may need, and the
    scratch memory of operators do not count.
    """

    name: ClassVar[str] = "ram_bytes"
    budget_key: ClassVar[str] = "ram"
    unit: ClassVar[str] = "B"
    kind: ClassVar[Kind] = "analytic"

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        graph, candidate = without_unused(graph, candidate)
        return float(plan_arena(graph, candidate).total_bytes)


@dataclass(frozen=True, slots=True)
class Microcontroller:
    """Bytes that a network takes of a microcontroller; code, stack and input buffers not."""

    flash_bytes: int
    ram_bytes: int


def microcontroller(
    graph: Graph,
    candidate: Candidate,
    weights: Weights = "flash",
    rules: ArenaRules | None = None,
) -> Microcontroller:
    """Flash and RAM of a candidate.

    Args:
        graph: the folded network.
        candidate: its widths.
        weights: "flash": kernels read packed weights where they lie; "streamed": each layer's
            packed weights are copied to the arena while it runs; "resident": all of them are
            copied to RAM at the start.
        rules: of the target's kernels.

    Raises:
        UsageError: another word for `weights`.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights are {', '.join(WEIGHTS)}; got {weights!r}")
    flash = size_bytes(graph, candidate)
    graph, candidate = without_unused(graph, candidate)
    rules = rules or ArenaRules()
    if weights == "streamed":
        rules = replace(rules, scratch=_with_weights(rules))
    ram = plan_arena(graph, candidate, rules).total_bytes
    if weights == "resident":
        ram += sum(_layer_bytes(graph, candidate, layer.name) for layer in graph.layers)
    return Microcontroller(flash, ram)


def _with_weights(rules: ArenaRules) -> Scratch:
    def scratch(graph: Graph, candidate: Candidate, node: int) -> int:
        own = 0 if rules.scratch is None else rules.scratch(graph, candidate, node)
        layer = graph.layer_at.get(node)
        return own + (0 if layer is None else _layer_bytes(graph, candidate, layer.name))

    return scratch


def _layer_bytes(graph: Graph, candidate: Candidate, name: str) -> int:
    """Of a layer's entry in the packed file; an upper bound where channels are removed."""
    quant = candidate.assignment.get(name, float(FLOAT_BITS))
    return layer_term(graph, graph.layer_of[name], quant)
