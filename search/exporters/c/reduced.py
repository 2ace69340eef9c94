"""The integer program without removed channels, with the constants of the whole one.

Output scales follow from bounds over all weights, absent ones included, so a program lowered from
the smaller network alone could differ from the referee. Here every constant is the referee's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from quant_ops.dual import without_unused_layers
from quant_ops.graph import Graph, ParamRef
from quant_ops.lowering import lower
from quant_ops.program import Combine, Convolution, IntegerProgram, MatMul, Step
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.reduced import reduced_model
from quant_ops.removal import Removal, plan_removal
from quant_ops.requantize import Codes, Integers, Rescale
from quant_ops.slots import Ids


@dataclass(frozen=True, eq=False)
class ReducedProgram:
    """A program and what its steps came from.

    Attributes:
        program: computes what the referee computes.
        graph: its nodes, numbered like the program's values.
        layers: name of each layer's node to the stored form of its weights.
    """

    program: IntegerProgram
    graph: Graph
    layers: Mapping[str, QuantizedLayer]


def reduced_program(model: QuantizedModel) -> ReducedProgram:
    """Lower `model`, then take out the channels that a packed file does not hold."""
    model = without_unused_layers(model)
    full = lower(model)
    smaller = reduced_model(model)
    if smaller is model:
        return _result(full, model)
    removal = plan_removal(model.graph, model.candidate)
    return _result(_with_constants(lower(smaller), full, model.graph, removal), smaller)


def _result(program: IntegerProgram, model: QuantizedModel) -> ReducedProgram:
    layers = {
        model.graph.nodes[site].name: model.layers[layer.name]
        for site, layer in model.graph.layer_at.items()
        if layer.name in model.layers
    }
    return ReducedProgram(program, model.graph, layers)


def _with_constants(
    program: IntegerProgram, full: IntegerProgram, whole: Graph, removal: Removal
) -> IntegerProgram:
    """The smaller program with the whole one's meanings of values and rescalings."""
    theirs = {step.name: step for step in full.steps}
    codes: list[Codes | None] = list(program.codes)
    steps = []
    for step in program.steps:
        twin = theirs.get(step.name)
        if twin is None or type(twin) is not type(step):
            codes[step.out] = codes[step.sources[0]] if step.sources else codes[step.out]
            steps.append(step)
            continue
        codes[step.out] = full.codes[twin.out]
        steps.append(_with_rescale(step, twin, _kept(step, whole, removal)))
    return IntegerProgram(tuple(steps), program.outputs, tuple(codes), program.edges)


def _kept(step: Step, whole: Graph, removal: Removal) -> Ids | None:
    """Positions of the rescaling's channels that remain, None for all."""
    index = whole.index_of[step.name]
    if isinstance(step, Convolution | MatMul):
        return removal.rows.get(whole.layer_at[index].name)
    gain = whole.nodes[index].args[1] if isinstance(step, Combine) else None
    if isinstance(gain, ParamRef) and gain.name in removal.params:
        return removal.params[gain.name][1]
    return None


def _with_rescale(step: Step, twin: Step, kept: Ids | None) -> Step:
    rescale = getattr(twin, "rescale", None)
    if not isinstance(rescale, Rescale):
        if hasattr(twin, "rescales"):
            return replace(step, rescales=twin.rescales)  # type: ignore[call-arg]
        return step
    if kept is not None:
        rescale = replace(
            rescale,
            multipliers=tuple(_picked(m, kept) for m in rescale.multipliers),
            offset=_picked(rescale.offset, kept),
            shift=_picked(rescale.shift, kept),
        )
    return replace(step, rescale=rescale)  # type: ignore[call-arg]


def _picked(array: Integers, kept: Ids) -> Integers:
    """Along the one axis that is longer than 1."""
    if array.size == 1:
        return array
    axis = int(np.argmax(array.shape))
    return array.take(kept, axis)
