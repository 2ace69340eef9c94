"""The integer program without removed channels, with the constants of the whole one.

Output scales follow from bounds over all weights, absent ones included, so a program lowered from
the smaller network alone could differ from the referee. Here every constant is the referee's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import without_unused_layers
from quant_ops.graph import Graph, Layer, ParamRef
from quant_ops.lowering import lower
from quant_ops.program import Combine, Convolution, IntegerProgram, MatMul, Step
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from quant_ops.removal import Removal, canonical_columns, plan_removal, remove_channels
from quant_ops.requantize import Codes, Integers, Rescale
from quant_ops.slots import Ids
from quant_ops.storage import prunes
from quant_ops.stored import StoredBias, StoredScale


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
    graph, candidate = model.graph, model.candidate
    if not prunes(candidate):
        return _result(full, model)
    removal = plan_removal(graph, candidate)
    if not removal:
        return _result(full, model)
    smaller, params = remove_channels(graph, model.params(), removal)
    layers = {
        name: _cut(graph.layer_of[name], quantized, removal)
        for name, quantized in model.layers.items()
    }
    quants = {
        name: LayerQuant(layers[name].bit_widths, quant.scheme, quant.group_size)
        for name, quant in candidate.layers
    }
    floats = {name: params[name] for name in model.float_params}
    reduced = QuantizedModel(
        smaller,
        Candidate.of(quants, candidate.activation_bits),
        layers,
        model.activations,
        floats,
    )
    program = _with_constants(lower(reduced), smaller, full, graph, removal)
    return _result(program, reduced)


def _result(program: IntegerProgram, model: QuantizedModel) -> ReducedProgram:
    layers = {
        model.graph.nodes[site].name: model.layers[layer.name]
        for site, layer in model.graph.layer_at.items()
        if layer.name in model.layers
    }
    return ReducedProgram(program, model.graph, layers)


def _cut(layer: Layer, quantized: QuantizedLayer, removal: Removal) -> QuantizedLayer:
    rows = removal.rows.get(layer.name, np.arange(layer.out_channels))
    codes = quantized.codes[rows]
    columns = removal.columns.get(layer.name)
    if columns is not None:
        codes = codes.reshape(len(rows), canonical_columns(layer), -1)[:, columns]
        codes = codes.reshape(len(rows), -1)
    widths = np.asarray(quantized.bit_widths)
    scales = {}
    for width, stored in quantized.scales.items():
        stays = np.isin(np.flatnonzero(widths == width), rows)
        scales[width] = StoredScale(stored.base, stored.ratio[stays])
    zero_points, bias = quantized.zero_points, quantized.bias
    return QuantizedLayer(
        tuple(quantized.bit_widths[row] for row in rows),
        codes,
        {width: scale for width, scale in scales.items() if scale.ratio.size},
        quantized.mid_rise,
        None if zero_points is None else zero_points[rows],
        None if bias is None else StoredBias(bias.base, bias.codes[rows]),
    )


def _with_constants(
    program: IntegerProgram, graph: Graph, full: IntegerProgram, whole: Graph, removal: Removal
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
