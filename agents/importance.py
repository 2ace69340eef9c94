"""How much each channel matters: five criteria behind one interface, one ranking from any of them.

Both controllers rank by the same importance, so that what one prunes is what the other would have
given the fewest bits [Tang2020].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quant_ops.channels import Tie, tied_channels
from quant_ops.graph import Graph
from search.space import SearchSpace
from search.strategy import ChannelFacts

Array = NDArray[np.float64]
REFERENCE_BITS = 4  # width whose error the Hessian criterion weighs
LOSSES = ("taylor", "hessian-error")  # criteria in units of the loss: layers can be compared
SCORE_FLOOR = 1e-6  # of a relative importance, before its logarithm


def weight_sum(facts: ChannelFacts) -> Array:
    """Sum of |w| over the channel's weights [He2018]."""
    return np.asarray(np.abs(facts.weights).sum(axis=1))


def weight_norm(facts: ChannelFacts) -> Array:
    """L2 norm of the channel's weights."""
    return np.asarray(np.sqrt((facts.weights**2).sum(axis=1)))


def norm_scale(facts: ChannelFacts) -> Array:
    """|gamma| of the channel's batch norm [Liu2017]; 1 where there is none."""
    return facts.gamma


def taylor(facts: ChannelFacts) -> Array:
    """Mean square of the first-order effect of removing the channel [Molchanov2019]."""
    return facts.taylor


def hessian_error(facts: ChannelFacts) -> Array:
    """Mean Hessian trace x squared error of 4 bits [Dong2020], per channel instead of per layer."""
    weights = facts.weights
    step = np.abs(weights).max(axis=1, keepdims=True) / (2 ** (REFERENCE_BITS - 1) - 1)
    step = np.where(step > 0, step, 1.0)
    error = weights - np.round(weights / step) * step
    return np.asarray(facts.trace / weights.shape[1] * (error**2).sum(axis=1))


CRITERIA: Mapping[str, Callable[[ChannelFacts], Array]] = {
    "weight-sum": weight_sum,
    "weight-norm": weight_norm,
    "norm-scale": norm_scale,
    "taylor": taylor,
    "hessian-error": hessian_error,
}


@dataclass(frozen=True, eq=False)
class Importance:
    """The ranking of every layer's genes (channels, or groups of them).

    Attributes:
        criterion: name of the criterion.
        channels: layer name to the importance of each output channel (out_channels,), divided by
            its layer's mean; channels that are removed together have their mean.
        genes: layer name to the mean over each gene's channels (genes,).
        levels: layer name to its mean importance; 1 for criteria that do not compare layers.
    """

    criterion: str
    channels: Mapping[str, Array]
    genes: Mapping[str, Array]
    levels: Mapping[str, float]

    @classmethod
    def of(
        cls, space: SearchSpace, facts: Mapping[str, ChannelFacts], criterion: str
    ) -> "Importance":
        """Rank the channels of a space.

        Raises:
            ValueError: there is no such criterion.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"importance must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        absolute = {name: CRITERIA[criterion](fact) for name, fact in facts.items()}
        levels = dict.fromkeys(absolute, 1.0)
        if criterion in LOSSES:
            levels = {name: float(scores.mean()) for name, scores in absolute.items()}
        raw = {name: _relative(scores) for name, scores in absolute.items()}
        channels = _shared(raw, ties_of(space.graph))
        genes = {}
        for choice in space.layers:
            groups = choice.groups or (tuple(range(len(channels[choice.name]))),)
            genes[choice.name] = np.array([channels[choice.name][list(g)].mean() for g in groups])
        return cls(criterion, channels, genes, levels)

    def with_levels(self, levels: Mapping[str, float]) -> "Importance":
        """The same ranking inside of layers, other means of the layers."""
        return replace(self, levels=levels)

    @cached_property
    def order(self) -> Mapping[str, NDArray[np.intp]]:
        """Layer name to its genes from the least important to the most important one."""
        return {name: np.argsort(scores, kind="stable") for name, scores in self.genes.items()}

    def to_json(self) -> dict[str, object]:
        """A JSON value: the ranking behind a run's decisions."""
        channels = {n: [float(f"{v:.4g}") for v in scores] for n, scores in self.channels.items()}
        return {"criterion": self.criterion, "channels": channels}


def ties_of(graph: Graph) -> tuple[Tie, ...]:
    """`tied_channels`; a graph without operators ties nothing and holds nothing back."""
    if graph.nodes:
        return tied_channels(graph)
    return tuple(
        Tie(((layer.name, channel),), True)
        for layer in graph.layers
        for channel in range(layer.out_channels)
    )


def _relative(scores: Array) -> Array:
    mean = float(scores.mean())
    return scores / mean if mean > 0 else np.ones_like(scores)


def _shared(raw: Mapping[str, Array], ties: tuple[Tie, ...]) -> dict[str, Array]:
    """Channels that leave only together get the mean of their importances."""
    shared = {name: scores.copy() for name, scores in raw.items()}
    for tie in ties:
        members = [(name, channel) for name, channel in tie.channels if name in raw]
        if tie.removable and len({name for name, _ in members}) > 1:
            mean = float(np.mean([raw[name][channel] for name, channel in members]))
            for name, channel in members:
                shared[name][channel] = mean
    return {name: _relative(scores) for name, scores in shared.items()}
