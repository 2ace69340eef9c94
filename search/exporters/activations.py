"""Activation quantizers for a point whose weights alone were quantized."""

from dataclasses import replace

from quant_ops.calibration import calibrate, choose_activation_quant
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.packed import PackedModel
from search.data import Split

ADDED_BITS = 8


def with_activations(packed: PackedModel, split: Split, ranges: str | None) -> PackedModel:
    """The same weights, every value that may be narrow at 8 bits.

    Ranges are those of the network with its quantized weights on `split`, chosen as in a search.
    """
    model = packed.model
    edges = {
        edge.name: edge.node
        for edge in activation_edges(model.graph)
        if edge.kind not in ("output", "partial")
    }
    found = calibrate(model.graph, model.params(), split.batches, edges=edges).edges
    activations = {
        name: choose_activation_quant(found[name], ADDED_BITS, ranges)
        for name in edges
        if name in found
    }
    candidate = Candidate.of(dict(model.candidate.layers), dict.fromkeys(activations, ADDED_BITS))
    return PackedModel.from_model(replace(model, candidate=candidate, activations=activations))
