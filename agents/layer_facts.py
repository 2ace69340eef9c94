"""One layer as the agents see it: its ranking, its widths, and what importance says of it."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from agents.importance import SCORE_FLOOR, Importance, ties_of
from quant_ops.graph import Graph, Layer
from search.space import LayerChoice, SearchSpace

Ints = NDArray[np.intp]
Floats = NDArray[np.float64]

WITHIN = 0.5  # of what importance says of the channels of one layer: it is noisier than of layers
MOST_TILT = 3.0  # bits that a layer lies above or below the others

STATIC_FIELDS = (
    "position",  # number of the layer / number of layers - 1
    "depthwise",  # 1 where every output channel has inputs of its own
    "linear",  # 1 for linear layers and embeddings
    "out_channels",  # log2 / 12
    "weights_per_channel",  # log2 / 16
    "weights_share",  # share of the weights of all layers
    "macs_share",  # share of the multiply-accumulates of all layers
    "tied",  # share of its channels that leave only with another layer's
    "prunable",  # share of its genes that may go
    "spread",  # standard deviation of the natural logarithm of its importances / 3
    "low_half",  # share of its importance in the lower half of the ranking x 2
    "prior",  # bits that importance puts it above the mean of the network / 8 + 1/2
)


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """One layer as the agents see it.

    Attributes:
        name: of the layer.
        start: its first gene.
        widths: legal widths, ascending.
        order: its genes (counted within the layer), least important first.
        scores: (genes,) importance relative to the layer's mean.
        prunable: (genes,) whether a gene may get 0 bits and leave.
        n_most: how many may go at once.
        weights: (genes,) number of weights of each.
        importance: of the whole layer; 1 where layers are not set apart by it.
        prior: (genes,) bits that importance puts each above the mean of the network.
        observation: (len(STATIC_FIELDS),) in [0, 1].
    """

    name: str
    start: int
    widths: Floats
    order: Ints
    scores: Floats
    prunable: NDArray[np.bool_]
    n_most: int
    weights: Floats
    importance: float
    prior: Floats
    observation: Floats

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.scores)

    @property
    def first_width(self) -> int:
        """Position of the narrowest width that keeps a channel."""
        return int(self.widths[0] == 0 and len(self.widths) > 1)

    @property
    def has_choice(self) -> bool:
        """Whether there is anything to decide."""
        return len(self.widths) > 1

    @cached_property
    def n_weights(self) -> float:
        """Number of weights."""
        return float(self.weights.sum())

    def clipped(self, bits: Floats) -> Floats:
        """(..., genes) bits inside what each gene may have; 0 where it may leave."""
        low = np.where(self.prunable, 0.0, self.lowest_width)
        return np.clip(bits, low, self.widths[-1])

    @cached_property
    def going(self) -> Ints:
        """Genes that may leave, least important first."""
        return np.asarray(self.order[self.prunable[self.order]])

    @cached_property
    def lowest_width(self) -> float:
        """The narrowest width that keeps a channel."""
        return float(self.widths[self.first_width])

    @cached_property
    def is_zero(self) -> NDArray[np.bool_]:
        """(widths,): whether a position means 0 bits."""
        return np.asarray(self.widths == 0)

    def nearest(self, widths: Floats, at_least: Ints) -> Ints:
        """(n,) positions of the nearest widths that keep a channel, none before `at_least`."""
        far = np.abs(self.widths - widths[:, None])
        start = np.maximum(self.first_width, at_least)
        far[np.arange(len(self.widths)) < start[:, None]] = np.inf
        return np.asarray(far.argmin(axis=1))


def layers_of(space: SearchSpace, importance: Importance, tilt: float) -> tuple[LayerFacts, ...]:
    """Every layer of a space; `tilt` is how far layers are trusted to differ, 0 to 1."""
    priors = _priors(space, importance, tilt)
    graph = space.graph
    total = float(sum(graph.layer_of[c.name].n_weights for c in space.layers))
    macs = float(sum(graph.layer_of[c.name].macs for c in space.layers)) or 1.0
    tied = _tied_shares(graph)
    may = prunable_genes(space)
    out, start = [], 0
    for number, choice in enumerate(space.layers):
        layer = graph.layer_of[choice.name]
        scores = importance.genes[choice.name]
        fields = [
            number / max(1, len(space.layers) - 1),
            float(layer.groups == layer.out_channels > 1),
            float(layer.kind in ("linear", "embedding")),
            math.log2(layer.out_channels) / 12,
            math.log2(layer.weights_per_channel) / 16,
            layer.n_weights / total,
            layer.macs / macs,
            tied[choice.name],
            float(may[number].mean()),
            float(np.log(np.maximum(scores, 1e-6)).std()) / 3,
            _low_half(scores),
            float(priors[number].mean()) / 8 + 0.5,
        ]
        out.append(
            LayerFacts(
                choice.name,
                start,
                np.array(choice.bit_widths, float),
                importance.order[choice.name],
                scores,
                may[number],
                _most(choice, may[number]),
                _weights(choice, layer),
                (importance.levels[choice.name] * layer.out_channels) ** tilt,
                priors[number],
                np.clip(np.array(fields), 0.0, 1.0),
            )
        )
        start += choice.n_genes
    return tuple(out)


def _weights(choice: LayerChoice, layer: Layer) -> Floats:
    sizes = [len(g) for g in choice.groups] or [layer.out_channels]
    return np.array(sizes, float) * layer.weights_per_channel


def _most(choice: LayerChoice, prunable: NDArray[np.bool_]) -> int:
    """A layer keeps one gene, unless an addition bypasses it."""
    whole = bool(prunable.all()) and (not choice.groups or choice.may_vanish)
    return int(prunable.sum()) if whole else min(int(prunable.sum()), len(prunable) - 1)


def _low_half(scores: Floats) -> float:
    ordered = np.sort(scores)
    return float(2 * ordered[: len(ordered) // 2].sum() / max(ordered.sum(), 1e-12))


def _tied_shares(graph: Graph) -> dict[str, float]:
    counts = dict.fromkeys(graph.layer_of, 0)
    for tie in ties_of(graph):
        if len(tie.layers) > 1:
            for name, _ in tie.channels:
                counts[name] += 1
    return {name: n / graph.layer_of[name].out_channels for name, n in counts.items()}


def _priors(space: SearchSpace, importance: Importance, tilt: float) -> list[Floats]:
    """Per layer (genes,) half the binary logarithm of importance per weight, less its mean."""
    graph = space.graph
    layers = []
    for choice in space.layers:
        per_weight = (
            importance.levels[choice.name] / graph.layer_of[choice.name].weights_per_channel
        )
        layers.append(0.5 * math.log2(max(per_weight, 1e-30)))
    sizes = [graph.layer_of[c.name].n_weights for c in space.layers]
    mean = float(np.average(layers, weights=sizes)) if layers else 0.0
    out = []
    for choice, bits in zip(space.layers, layers, strict=True):
        scores = np.maximum(importance.genes[choice.name], SCORE_FLOOR)
        above = min(max(tilt * (bits - mean), -MOST_TILT), MOST_TILT)
        out.append(above + WITHIN * 0.5 * np.log2(scores))
    return out


def prunable_genes(space: SearchSpace) -> list[NDArray[np.bool_]]:
    """Per layer which genes may get 0 bits and really leave the network."""
    held = {
        (name, channel)
        for tie in ties_of(space.graph)
        if not tie.removable
        for name, channel in tie.channels
    }
    out = []
    for choice in space.layers:
        n = space.graph.layer_of[choice.name].out_channels
        may = 0 in choice.bit_widths and len(choice.bit_widths) > 1
        if not choice.groups:  # a whole layer at 0 bits is legal only where it is bypassed
            out.append(np.array([may]))
            continue
        stays = [any((choice.name, c) in held for c in group) for group in choice.groups]
        out.append(np.array([may and n > 1 and not s for s in stays]))
    return out
