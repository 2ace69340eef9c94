"""What every output channel at every width costs the outputs, from one set of gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph, Layer, Ref
from quant_ops.operators import EMBEDDING
from quant_ops.perturbation import Predictor, Run, drawn, has_few_classes, of_every_class
from quant_ops.sensitivity import OutputGradient


def channel_losses(
    bank: WeightBank,
    batches: Iterable[tuple[Sequence[Tensor], Any]],
    widths: Mapping[str, Sequence[float]],
    output_gradient: OutputGradient,
    *,
    logits: bool,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Second-order loss of each channel alone at each width, the rest of the network float.

    Half the mean of v' F v, with v the change of the channel's values carried to the logits and
    F the curvature of the divergence; with drawn output gradients where there are many logits.
    Channels of one layer are taken one by one, so that their losses do not quite add up to the
    layer's.

    Args:
        bank: of the network.
        batches: (inputs, target) pairs; targets are ignored.
        widths: layer name to the widths wanted.
        output_gradient: see `predicted_losses`.
        logits: whether the outputs are class scores.
        seed: of the draws.

    Returns:
        Layer name to (out_channels, widths).
    """
    changes = [Candidate.of({name: width}) for name, ws in widths.items() for width in ws]
    place = [(name, at) for name, ws in widths.items() for at in range(len(ws))]
    graph = bank.graph
    out = {
        name: np.zeros((graph.layer_of[name].out_channels, len(ws))) for name, ws in widths.items()
    }
    predictor = Predictor(bank, changes)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for inputs, _ in batches:
        run = predictor.forward(inputs)
        few = logits and has_few_classes(run)
        if few:
            share = run.outputs[0].detach().softmax(dim=1)
            cotangents = of_every_class(run.outputs[0])
        else:
            cotangents = drawn(run, output_gradient, generator)
        for node, numbers, gradients in predictor.gradients(run, cotangents):
            for number in numbers:
                name, at = place[number]
                with torch.inference_mode():
                    change = predictor.change(changes[number], node, run.values)
                    moved = _per_channel(gradients * change, graph, graph.layer_of[name], node, run)
                    square = moved.square()
                    if few:
                        mean = torch.einsum("bp,pbc->bc", share, square)
                        variance = mean - torch.einsum("bp,pbc->bc", share, moved).square()
                    else:
                        variance = square.mean(dim=0)
                    out[name][:, at] += 0.5 * variance.double().sum(dim=0).numpy()
        count += len(run.outputs[0])
    return {name: losses / max(1, count) for name, losses in out.items()}


def _per_channel(product: Tensor, graph: Graph, layer: Layer, site: int, run: Run) -> Tensor:
    """Sum of gradient x change over the positions of each channel: (passes, batch, channels)."""
    node = graph.nodes[site]
    if node.op in EMBEDDING:  # channels are rows of the table, met where the indices say
        source = node.args[1]
        assert isinstance(source, Ref)
        indices = run.values[source.index]
        met = product.sum(dim=-1).reshape(len(product), len(indices), -1)
        rows = indices.reshape(len(indices), -1).expand_as(met)
        return met.new_zeros(*met.shape[:2], layer.out_channels).scatter_add(2, rows, met)
    if layer.kind == "linear":
        return product.flatten(2, -2).sum(dim=2) if product.dim() > 3 else product
    return product.flatten(3).sum(dim=3) if product.dim() > 3 else product
