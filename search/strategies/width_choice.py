"""From learned widths to a candidate of an exact size."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from quant_ops.learned_widths.base import LearnedWidths
from quant_ops.learned_widths.fill import fill
from quant_ops.learned_widths.size import with_widths
from search.space import LayerChoice, SearchSpace
from search.strategy import ChannelLosses, Context


@dataclass(frozen=True)
class WidthChoice:
    """What is learned of a space, and how leftover bytes are spent.

    Attributes:
        context: for exact sizes.
        layers: with more than one legal width; residual layers stay absent.
        scores: layer name to the loss of each channel at 0 bits, as 4^-b extrapolates it.
    """

    context: Context
    layers: tuple[LayerChoice, ...]
    scores: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, context: Context) -> "WidthChoice":
        """That of a run."""
        layers = learned_layers(context.space)
        return cls(context, layers, _scores(layers, context.channel_losses()))

    def widest(self) -> Candidate:
        """Every layer at its widest width, where the learning starts."""
        return self.context.space.uniform(8)

    def chosen(self, modules: Mapping[str, LearnedWidths]) -> Candidate:
        """The modules' discrete widths; a layer that must not vanish keeps its best channel."""
        may_vanish = {c.name: c.may_vanish for c in self.layers}
        widths = {name: module.bit_widths() for name, module in modules.items()}
        for name, mine in widths.items():
            if not may_vanish[name] and not any(mine):
                best = int(np.argmax(self.scores[name]))
                least = min(w for w in modules[name].choices if w)
                widths[name] = tuple(least if c == best else 0.0 for c in range(len(mine)))
        return with_widths(self.widest(), widths)

    def filled(self, candidate: Candidate, budget_bytes: int) -> Candidate:
        """The candidate with widths moved until it uses up the budget, and is never above.

        Channels are moved one by one, whole layers where the target has one width per layer.

        Raises:
            BudgetError: not even the narrowest widths fit.
        """
        space = self.context.space
        whole = {
            c.name: [tuple(range(space.graph.layer_of[c.name].out_channels))] for c in self.layers
        }
        return fill(
            space.graph,
            candidate,
            legal={c.name: c.bit_widths for c in self.layers},
            scores=self.scores,
            budget_bytes=budget_bytes,
            size_of=self.context.size_of,
            groups=whole if space.finest == "layer" else None,
            remove=True,
        )


def learned_layers(space: SearchSpace) -> tuple[LayerChoice, ...]:
    """Layers with more than one legal width that are no residual of another."""
    return tuple(
        c for c in space.layers if len([b for b in c.bit_widths if b]) > 1 and not c.residual_of
    )


def _scores(
    layers: tuple[LayerChoice, ...], losses: ChannelLosses
) -> dict[str, NDArray[np.float64]]:
    out = {}
    for choice in layers:
        predicted, _ = losses[choice.name]
        widths = np.array(choice.bit_widths, dtype=np.float64)
        present = widths > 0
        scores = np.median(predicted[:, present] * 4.0 ** widths[present], axis=1)
        floor = max(float(scores.max()) * 1e-9, 1e-30)
        out[choice.name] = np.where(np.isfinite(scores), np.maximum(scores, floor), floor)
    return out
