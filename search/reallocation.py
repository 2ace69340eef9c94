"""Widths moved between layers after recovery, where recovery changed what a bit is worth."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.dual import main_of, residual_of, without_unused
from quant_ops.manifest import param_order
from quant_ops.quantized import QuantizedLayer, QuantizedModel
from search.allocation import allocate
from search.prepare import Prepared

MAX_CHANGES = 4  # layers whose width moves at once: single effects add up only nearby


def reallocated(
    prepared: Prepared, model: QuantizedModel, limit_bytes: int, *, max_changes: int = MAX_CHANGES
) -> Candidate | None:
    """The recovered model's widths, moved by one step in a few layers to lower the loss.

    Every layer of one width is rounded anew at that width and at the next narrower and wider
    legal one above 0, the other layers staying as they were recovered. The differences of the
    losses fill an integer program under `limit_bytes`: a bit is judged by what it is worth to
    the recovered network, not to the float one.

    Args:
        prepared: the task.
        model: recovered.
        limit_bytes: largest packed file.
        max_changes: layers that may change.

    Returns:
        Another candidate of at most `limit_bytes`, or None where no change is predicted to help.
    """
    candidate = model.candidate
    options = _options(prepared, candidate)
    changes = [{name: width} for name, widths in options.items() for width in widths]
    losses = iter(_losses(prepared, model, changes))
    size_of = prepared.costs["size_bytes"].cost
    graph = prepared.traced.graph
    base = size_of(graph, candidate)
    gains: list[NDArray[np.float64]] = []
    sizes: list[NDArray[np.float64]] = []
    moved: list[NDArray[np.float64]] = []
    for name, widths in options.items():
        measured = np.array([next(losses) for _ in widths])
        gains.append(measured - measured[0])
        sizes.append(
            np.array([size_of(graph, candidate.replace({name: w})) - base for w in widths])
        )
        moved.append(np.array([0.0] + [1.0] * (len(widths) - 1)))
    limits = {"size_bytes": limit_bytes - base, "changes": float(max_changes)}
    choice = allocate(gains, {"size_bytes": sizes, "changes": moved}, limits)
    if choice is None or not any(choice):
        return None
    picked = zip(options.items(), choice, strict=True)
    found = candidate.replace({name: widths[at] for (name, widths), at in picked if at})
    return found if size_of(graph, found) <= limit_bytes else None


def as_searched(model: QuantizedModel, prepared: Prepared, candidate: Candidate) -> QuantizedModel:
    """A model read from a packed file, which holds no names, under the names of the network."""
    whole, read = prepared.traced.graph, model.graph
    graph, held = without_unused(whole, candidate)
    bank = prepared.evaluator.bank
    absent = {
        name: bank.layer(name, quant)
        for name, quant in candidate.layers
        if name not in held.assignment
    }
    layer = {a.name: b.name for a, b in zip(read.layers, graph.layers, strict=True)}
    edge = {a.name: b.name for a, b in zip(read.nodes, graph.nodes, strict=True)}
    param = dict(zip(param_order(read), param_order(graph), strict=True))
    return QuantizedModel(
        whole,
        candidate,
        {**{layer[name]: quantized for name, quantized in model.layers.items()}, **absent},
        {edge[name]: quant for name, quant in model.activations.items()},
        {param[name]: value for name, value in model.float_params.items()},
    )


def _options(prepared: Prepared, candidate: Candidate) -> dict[str, list[LayerQuant]]:
    """Layer name to its present width and the legal ones beside it, for layers that may move."""
    out: dict[str, list[LayerQuant]] = {}
    for choice in prepared.space.layers:
        quant = candidate.assignment[choice.name]
        now = quant.uniform
        if not now or quant != LayerQuant((now,), quant.scheme) or len(choice.bit_widths) < 2:
            continue
        at = choice.bit_widths.index(now)
        near = choice.bit_widths[max(0, at - 1) : at + 2]
        beside = (LayerQuant((width,), quant.scheme) for width in near if width not in (0, now))
        out[choice.name] = [quant, *beside]
    return {name: widths for name, widths in out.items() if len(widths) > 1}


def _losses(
    prepared: Prepared, model: QuantizedModel, changes: Sequence[Mapping[str, LayerQuant]]
) -> list[float]:
    bank, evaluator = prepared.evaluator.bank, prepared.evaluator
    graph = prepared.traced.graph
    residual, main = residual_of(graph), main_of(graph)
    variants: list[dict[str, QuantizedLayer]] = []
    for change in changes:
        rounded = bank.quantize(model.candidate.replace(change))
        # of a layer and its residual, the codes of both depend on both widths
        beside = {residual.get(n, main.get(n, n)) for n in change} & rounded.layers.keys()
        variants.append({name: rounded.layers[name] for name in beside | change.keys()})
    return [m.loss for m in evaluator.measure_variants(model, variants, "probe")]
