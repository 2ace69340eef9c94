"""What the agents decide on: the layers of a space, the sizes, and the limits that bind them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from agents.importance import Importance
from agents.layer_facts import Floats, Ints, LayerFacts, layers_of, prunable_genes
from agents.size_model import SizeModel
from agents.structure import Ahead, Structure
from quant_ops.errors import UsageError
from search.space import SearchSpace
from search.strategies.distortion import measure_table
from search.strategy import Context

LAW_WIDTHS = (2, 3, 4)  # between a layer that is destroyed and one whose loss is noise
LEAST_LOSS = 1e-9
LEVELS = np.linspace(-16.0, 24.0, 161)  # bits; between them straight lines


@dataclass(frozen=True, eq=False)
class Problem:
    """A space, its ranking, and the estimate of sizes. Layers without a choice are not in `steps`.

    Attributes:
        space: what may be chosen.
        importance: the ranking that both controllers share.
        layers: every layer of the space.
        steps: numbers of the layers that have a choice, in execution order.
        size: the estimate.
        limits: smallest and largest budget in bytes.
        groups: rank groups that the channel controller acts on, per layer.
        structure: limits that only pruning can meet; None where there are none.
        is_measured: whether rate-distortion has measured each layer alone.
    """

    space: SearchSpace
    importance: Importance
    layers: tuple[LayerFacts, ...]
    steps: tuple[int, ...]
    size: SizeModel
    limits: tuple[float, float]
    groups: int
    structure: Structure | None = None
    is_measured: bool = False

    @classmethod
    def of(cls, context: Context, criterion: str, groups: int, *, tilt: float = 1.0) -> "Problem":
        """From what the engine offers; `tilt` is how far layers are trusted to differ, 0 to 1."""
        space = context.space
        importance = Importance.of(space, context.channel_facts(), criterion)
        is_measured = any(e.strategy == "rate-distortion" for e in context.history())
        if is_measured:
            importance = importance.with_levels(_measured_levels(context) or importance.levels)
        layers = layers_of(space, importance, tilt)
        largest = context.size_of(space.largest())
        high = min(context.budgets.get("size_bytes", largest), largest)
        low = context.size_of(space.smallest())
        steps = tuple(i for i, layer in enumerate(layers) if layer.has_choice)
        return cls(
            space, importance, layers, steps, SizeModel(space, largest),
            (float(min(low, high)), float(high)), groups,
            Structure.of(context, importance, layers), is_measured,
        )  # fmt: skip

    @cached_property
    def widest(self) -> Ints:
        """Every gene at its widest width."""
        return np.array([len(w) - 1 for w in self.space.gene_widths], dtype=np.intp)

    @cached_property
    def narrowest(self) -> Floats:
        """(genes,) the narrowest width of every gene."""
        return np.array([widths[0] for widths in self.space.gene_widths], float)

    @cached_property
    def n_weights(self) -> float:
        """Weights of all layers."""
        return sum(layer.n_weights for layer in self.layers)

    def shares(self, at: int, mean_bits: Floats) -> Floats:
        """(n, genes of layer `at`) bits that importance earns each gene.

        So that this and later layers have (n,) `mean_bits` per weight: gene g has level + prior_g,
        clipped to its widths, with one level for all (reverse water-filling, where a bit less
        is worth 4 times the error). A gene that may leave has 0 bits at the least.
        """
        level = np.interp(mean_bits, self._means[at], LEVELS)
        return self.layers[at].clipped(level[:, None] + self.layers[at].prior)

    def structural_levels(self, at: int, missing: Floats) -> Floats:
        """(n,) levels under which genes of layer `at` and later ones go; see `Structure`."""
        return self._ahead[at].level_for(missing)

    @cached_property
    def _ahead(self) -> tuple[Ahead, ...]:
        if self.structure is None:
            return ()
        return tuple(Ahead.of(self.structure, layer.start) for layer in self.layers)

    @cached_property
    def _means(self) -> Floats:
        """(layers, levels) mean bits per weight of each and later layers at every level."""
        bits = [x.clipped(LEVELS[:, None] + x.prior) @ x.weights for x in self.layers]
        weights = [x.n_weights for x in self.layers]
        ahead = np.cumsum(bits[::-1], axis=0)[::-1]
        return np.asarray(ahead / np.cumsum(weights[::-1])[::-1, None])


def require_prunable(space: SearchSpace, strategy: str, instead: str) -> None:
    """Refuse a space where no channel can be pruned.

    Raises:
        UsageError: names the reason and what else to run.
    """
    if any(genes.any() for genes in prunable_genes(space)):
        return
    free = [choice for choice in space.layers if len(choice.bit_widths) > 1]
    if not free:
        reason = "every layer is pinned to one width; drop a --pin"
    elif not any(choice.groups for choice in free):
        reason = "widths are per layer here, use --granularity channel or group"
    elif not any(0 in choice.bit_widths for choice in free):
        reason = (
            "no layer may have 0 bits; put 0 into --bits and choose a target that removes channels"
        )
    else:
        names = [choice.name for choice in free]
        reason = (
            f"the channels of {', '.join(names[:4])}{', ...' * (len(names) > 4)} are tied to the "
            f"network's outputs or inputs, or to an operator that mixes them"
        )
    raise UsageError(
        f"strategy {strategy!r} prunes channels, but this network has nothing to prune: {reason}; "
        f"to choose widths alone use --strategy {instead}"
    )


def _measured_levels(context: Context) -> dict[str, float]:
    """Layer name to the mean importance of its channels, from the table of rate-distortion.

    Importance is what the loss of a layer alone is of 4^-width, at the widths where that holds.
    Nothing where a layer has a choice, but none of these widths: as channels of 0 or 8 bits.
    """
    layer_of = context.space.graph.layer_of
    table = measure_table(context)
    levels = dict.fromkeys(layer_of, LEAST_LOSS)  # of a residual beside a layer
    for group, losses in zip(table.groups, table.losses, strict=True):
        name = group.names[0]
        if name in layer_of:
            alone = group.alone()
            widths = np.array(group.widths[0])[[group.choices[c][0] for c in alone]]
            in_law = np.isin(widths, LAW_WIDTHS) | (len(widths) == 1)
            if not in_law.any():
                return {}
            falls = (losses[alone] * 4.0**widths)[in_law]
            level = np.exp(np.log(np.maximum(falls, LEAST_LOSS)).mean())
            levels[name] = float(level) / layer_of[name].out_channels
    return levels
