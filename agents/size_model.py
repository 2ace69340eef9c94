"""Bytes of a genome, estimated in microseconds: what an agent may look at between decisions.

Codes, scales and biases of the channels that are left, with the inputs that removed channels
take along; the few bytes of width maps and padding are missing. The exact size decides in the end.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.channels import analyse
from search.space import SearchSpace

CHANNEL_BYTES = 3  # one byte of scale, two of bias

Ints = NDArray[np.intp]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """What the estimate needs of one layer.

    Attributes:
        genes: its first gene and the one after its last.
        widths: legal widths, ascending.
        channels: (genes,) output channels of each.
        weights_per_input: weights of one output channel that read one input channel.
        gene_of_channel: (out_channels,) gene of each channel, counted within the layer.
        component: (out_channels,) number of the set each is removed with; 0 is never removed.
        is_simple: whether every channel is in a set of its own, as in most layers.
        inputs: (in_channels,) the same for what it reads; empty where that does not matter.
        n_inputs: input channels per output channel.
    """

    genes: tuple[int, int]
    widths: Floats
    channels: Floats
    weights_per_input: float
    gene_of_channel: Ints
    component: Ints
    is_simple: bool
    inputs: Ints
    n_inputs: int


class SizeModel:
    """The estimate for one space."""

    def __init__(self, space: SearchSpace, exact_largest: int) -> None:
        self.layers = _terms(space)
        self.n_components = 1 + max(
            (int(ids.max(initial=0)) for x in self.layers for ids in (x.component, x.inputs)),
            default=0,
        )
        self.members = np.zeros(self.n_components)
        for layer in self.layers:
            self.members += np.bincount(layer.component, minlength=self.n_components)
        n_genes = len(space.gene_widths)
        widest = np.array([len(w) - 1 for w in space.gene_widths], dtype=np.intp)
        self.n_genes = n_genes
        self.fixed = 0.0  # until the estimate of the widest genome says what is missing
        self.fixed = exact_largest - float(self.estimate(widest[None])[0])

    def estimate(self, genomes: Ints) -> Floats:
        """Bytes of (n, genes) whole genomes."""
        zero = np.zeros((len(genomes), self.n_components))
        for layer in self.layers:
            self.count_zeros(layer, genomes, zero)
        total = np.full(len(genomes), self.fixed)
        for layer in self.layers:
            total += self.layer_bytes(layer, genomes, zero)
        return np.asarray(np.maximum(total, 1.0))

    def count_zeros(self, layer: LayerTerms, genomes: Ints, zero: Floats) -> None:
        """Add to (n, components) how many members of each set this layer has at width 0."""
        start, stop = layer.genes
        if layer.widths[0] > 0:
            return
        gone = genomes[:, start:stop] == 0
        if not gone.any():
            return
        channels = gone[:, layer.gene_of_channel]
        if layer.is_simple:
            zero[:, layer.component] += channels
        else:
            np.add.at(zero.T, layer.component, channels.T)

    def layer_bytes(self, layer: LayerTerms, genomes: Ints, zero: Floats) -> Floats:
        """(n,) bytes of one layer; `zero` counts the members of each set that are at width 0."""
        start, stop = layer.genes
        width = layer.widths[genomes[:, start:stop]]
        n_inputs: Floats | int = layer.n_inputs
        if layer.inputs.size:
            full = zero[:, layer.inputs] >= self.members[layer.inputs]
            n_inputs = layer.n_inputs - (full & (layer.inputs > 0)).sum(axis=1)
        bits = width @ layer.channels * layer.weights_per_input * n_inputs
        return np.asarray(bits / 8 + CHANNEL_BYTES * ((width > 0) @ layer.channels))


def _terms(space: SearchSpace) -> list[LayerTerms]:
    graph = space.graph
    analysis = analyse(graph) if graph.nodes else None
    terms, start, atom = [], 0, 0
    for choice in space.layers:
        layer = graph.layer_of[choice.name]
        n = layer.out_channels
        groups = choice.groups or (tuple(range(n)),)
        gene_of_channel = np.zeros(n, dtype=np.intp)
        for gene, group in enumerate(groups):
            gene_of_channel[list(group)] = gene
        inputs = np.zeros(0, dtype=np.intp)
        n_inputs = 1
        if analysis is None:
            component = np.arange(atom + 1, atom + n + 1, dtype=np.intp)
        else:
            first, last = analysis.atom_range[layer.name]
            component = analysis.component[first:last].astype(np.intp)
            if layer.groups == 1 and layer.name in analysis.layer_inputs:
                found = analysis.layer_inputs[layer.name][0]
                inputs, n_inputs = analysis.component[found].astype(np.intp), len(found)
        atom += n
        terms.append(
            LayerTerms(
                (start, start + len(groups)),
                np.array(choice.bit_widths, float),
                np.array([len(g) for g in groups], float),
                layer.weights_per_channel / n_inputs,
                gene_of_channel,
                component,
                len(np.unique(component)) == len(component),
                inputs,
                n_inputs,
            )
        )
        start += len(groups)
    return terms
