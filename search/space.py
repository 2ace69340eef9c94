"""What may be chosen: legal widths per layer and activation edge, pins, ties."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.graph import Graph


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """Ascending legal widths of one layer; one width means pinned.

    `groups` partitions the output channels when widths are chosen per group or per channel;
    empty means one width for the layer. Where `may_vanish` is false, at least one group keeps
    a width above 0. `residual_of` names the layer that this one is the residual of, if any
    (`quant_ops.dual`); it comes right after that layer and its first width is 0.
    """

    name: str
    bit_widths: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    may_vanish: bool = True
    residual_of: str | None = None

    @property
    def n_genes(self) -> int:
        """How many widths are chosen for this layer."""
        return len(self.groups) or 1


@dataclass(frozen=True, slots=True)
class EdgeChoice:
    """Ascending legal activation widths of one edge."""

    name: str
    bit_widths: tuple[int, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Every candidate the search may propose.

    A genome is one position per gene: first the layers' (one per channel group where there are
    groups), then the edges', each an index into that gene's ascending widths.
    `finest` is the finest unit that may have a width of its own, "channel" or "layer".
    """

    graph: Graph
    layers: tuple[LayerChoice, ...]
    activations: tuple[EdgeChoice, ...] = ()
    scheme: str = "auto"
    finest: str = "channel"

    @cached_property
    def gene_widths(self) -> tuple[tuple[float, ...], ...]:
        """For each gene its ascending widths."""
        genes: list[tuple[float, ...]] = []
        for choice in self.layers:
            genes += [choice.bit_widths] * choice.n_genes
        return (*genes, *(edge.bit_widths for edge in self.activations))

    def decode(self, genome: Sequence[int]) -> Candidate:
        """The candidate that a genome stands for."""
        layers: dict[str, LayerQuant] = {}
        at = 0
        for choice in self.layers:
            widths = [choice.bit_widths[int(g)] for g in genome[at : at + choice.n_genes]]
            at += choice.n_genes
            layers[choice.name] = LayerQuant(self._spread(choice, widths), self.scheme)
        edges = {
            edge.name: edge.bit_widths[int(g)]
            for edge, g in zip(self.activations, genome[at:], strict=True)
        }
        return Candidate.of(layers, edges)

    def _spread(self, choice: LayerChoice, widths: Sequence[float]) -> tuple[float, ...]:
        if not choice.groups:
            return (widths[0],)
        if not choice.may_vanish and not any(widths):
            kept = next((b for b in choice.bit_widths if b), 0.0)
            widths = [*widths[:-1], kept]
        out = [0.0] * self.graph.layer_of[choice.name].out_channels
        for group, width in zip(choice.groups, widths, strict=True):
            for channel in group:
                out[channel] = width
        return tuple(out)

    def encode(self, candidate: Candidate) -> tuple[int, ...]:
        """Inverse of `decode`; a width that is not legal becomes the nearest one that is."""
        assignment, edges = candidate.assignment, candidate.activation_bits
        genome: list[int] = []
        for choice in self.layers:
            n = self.graph.layer_of[choice.name].out_channels
            per_channel = assignment[choice.name].per_channel(n)
            heads = [group[0] for group in choice.groups] or [0]
            genome += [_nearest(choice.bit_widths, per_channel[head]) for head in heads]
        genome += [_nearest(e.bit_widths, edges.get(e.name, 32)) for e in self.activations]
        return tuple(genome)

    def contains(self, candidate: Candidate) -> bool:
        """Whether the candidate is one that `decode` can give, schemes aside."""
        names = tuple(name for name, _ in candidate.layers)
        if names != tuple(c.name for c in self.layers):
            return False
        nearest = self.decode(self.encode(candidate))
        return nearest.activations == candidate.activations and all(
            legal.bit_widths == proposed.bit_widths
            for (_, legal), (_, proposed) in zip(nearest.layers, candidate.layers, strict=True)
        )

    def allows(self, candidate: Candidate) -> bool:
        """Whether every channel has a width that is legal for its layer.

        Wider than `contains`: a method that learns widths may give channels of one group widths
        of their own where `finest` is "channel".
        """
        assignment = candidate.assignment
        edges = {edge.name: edge.bit_widths for edge in self.activations}
        if tuple(assignment) != tuple(c.name for c in self.layers):
            return False
        if set(edges) != set(candidate.activation_bits):
            return False
        return all(b in edges[name] for name, b in candidate.activations) and all(
            set(assignment[c.name].bit_widths) <= set(c.bit_widths)
            and (self.finest == "channel" or assignment[c.name].uniform is not None)
            and (c.may_vanish or any(assignment[c.name].bit_widths))
            for c in self.layers
        )

    def uniform(self, bit_width: float) -> Candidate:
        """The candidate nearest to `bit_width` everywhere, without residual layers."""
        genome: list[int] = []
        for choice in self.layers:
            wanted = 0.0 if choice.residual_of else bit_width
            genome += [_nearest(choice.bit_widths, wanted)] * choice.n_genes
        genome += [len(edge.bit_widths) - 1 for edge in self.activations]
        return self.decode(genome)

    def smallest(self) -> Candidate:
        """Every gene at its narrowest width."""
        return self.decode([0] * len(self.gene_widths))

    def largest(self) -> Candidate:
        """Every gene at its widest width."""
        return self.decode([len(widths) - 1 for widths in self.gene_widths])

    def sample(self, generator: np.random.Generator) -> Candidate:
        """A candidate with every gene drawn uniformly."""
        return self.decode([int(generator.integers(len(w))) for w in self.gene_widths])

    def weights_per_channel(self) -> Mapping[str, tuple[int, int]]:
        """Layer name to (out_channels, weights of one channel), for mean bit widths."""
        return {
            layer.name: (layer.out_channels, layer.weights_per_channel)
            for layer in self.graph.searchable_layers
        }


def _nearest(widths: Sequence[float], wanted: float) -> int:
    return min(range(len(widths)), key=lambda i: (abs(widths[i] - wanted), -widths[i]))
