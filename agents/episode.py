"""Candidates in the making, side by side: what the controllers see, and what actions mean.

An action is a number in [-1, 1] and a decision is what it means under the present budget. Both
ways are here: from an action to a decision while rolling out, and from a decision back to the
action that would have made it, under any budget, for hindsight and demonstrations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.importance import SCORE_FLOOR
from agents.layer_facts import STATIC_FIELDS, Floats, Ints, LayerFacts
from agents.problem import Problem

Rows = NDArray[np.float32]
Mask = NDArray[np.bool_]

WIDTH_SPAN = 1.0  # bits that the channel controller's action moves a group from what is needed
PRUNE_SPAN = 1.5  # bits that the layer controller's action moves the threshold of pruning
THRESHOLD = 0.5  # a channel with a smaller share of the bits is nearer to 0 than to 1 bit
NO_PRUNING = -0.25  # canonical action of `amc` where nothing is pruned: every negative one does
MARGIN = 1e-4  # bits between a threshold and a share, more than float32 rounds away
BITS = 8.0

LAYER_FIELDS = (
    *STATIC_FIELDS,
    "budget",  # mean bits per weight of the network that the budget allows / 8
    "even",  # mean bits per weight that is left for this and later layers / 8
    "share",  # mean bits per weight that the importance of this layer earns it of them / 8
    "spent",  # estimated bytes of earlier layers / budget
    "ahead",  # share of the weights in this and later layers
    "missing",  # share that has yet to be freed of limits that only pruning meets; 0 without any
    "frees",  # share of them that this layer could free
    "last_sparsity",  # share of genes that the previous step pruned
    "last_width",  # mean width of its survivors / 8
)
CHANNEL_FIELDS = (
    *STATIC_FIELDS,
    "budget",  # as above
    "even",  # as above
    "sparsity",  # share of this layer's genes that were pruned
    "goal",  # mean width that the layer controller asked for / 8
    "needed",  # width of this group with which it and later ones meet the goal / 8
    "rank",  # number of the group / number of groups - 1
    "ahead",  # share of the survivors' weights in this and later groups
    "importance",  # natural logarithm of the group's mean importance / 8 + 1/2
    "last_width",  # width of the group before / 8
)


@dataclass(frozen=True, slots=True, eq=False)
class LayerDecisions:
    """What the layer controller decides: (n,) genes that go, and (n,) survivors' mean widths."""

    n_pruned: Ints
    goals: Floats


class Episodes:
    """Layers in execution order; in each, rank groups of survivors from least important on.

    Every method works on all `n` episodes at once; they are at the same layer and rank group.

    Args:
        problem: the constants.
        budgets: (n,) bytes that each candidate may take.
        zeros: per episode (genes,) genes that are gone from the start; None leaves that to the
            decisions.
    """

    def __init__(
        self, problem: Problem, budgets: Sequence[float], zeros: Sequence[Mask | None] = ()
    ) -> None:
        self.problem = problem
        self.budgets: Floats = np.array(budgets, float)
        n = len(self.budgets)
        self.genomes: Ints = np.tile(problem.widest, (n, 1))
        given = [None] * n if not zeros else list(zeros)
        self._is_given: Mask = np.array([z is not None for z in given], np.bool_)
        nothing = np.zeros(len(problem.widest), np.bool_)
        self._given: Mask = np.array([nothing if z is None else z for z in given], np.bool_)
        self._total_bits = 8 * (self.budgets - problem.size.fixed) / problem.n_weights
        self._gone = np.zeros((n, problem.size.n_components))
        self._spent = np.full(n, problem.size.fixed)
        self._missing = np.full(n, float(problem.structure is not None))
        self._ahead = problem.n_weights
        self._last = (np.zeros(n), np.ones(n))
        self._at = -1
        self._part = 0
        self._goals = np.full(n, BITS)
        self._part_of: Ints = np.zeros((n, 0), np.intp)
        self._n_parts: Ints = np.zeros(n, np.intp)
        self._settle_until_choice()

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.budgets)

    @property
    def done(self) -> bool:
        """Whether every layer is decided."""
        return self._at >= len(self.problem.layers)

    @property
    def layer(self) -> LayerFacts:
        """The layer that is being decided."""
        return self.problem.layers[self._at]

    @property
    def at(self) -> int:
        """Number of the layer that is being decided."""
        return self._at

    @property
    def even_bits(self) -> Floats:
        """(n,) mean bits per weight that is left for this and later layers."""
        left = 8 * (self.budgets - self._spent)
        return np.asarray(np.clip(left / max(self._ahead, 1.0), 0.25, 16.0))

    def layer_observations(self) -> Rows:
        """(n, len(LAYER_FIELDS)) in [0, 1]."""
        shares = self._shares()
        return self._rows(
            *self._budget_fields(),
            shares @ self.layer.weights / self.layer.n_weights / BITS,
            self._spent / self.budgets,
            self._ahead / self.problem.n_weights,
            self._missing,
            self._frees.sum(),
            self._last[0],
            self._last[1] / BITS,
        )

    def decisions_of(self, sparsities: Floats | None, widths: Floats | None) -> LayerDecisions:
        """The decisions that (n,) actions in [-1, 1] stand for; None prunes nothing, or is widest.

        Importance gives every channel a share of the bits that are left. Channels go whose share
        is below 1/2 + 1.5 x sparsity bits, those that limits besides bytes ask for as well
        (their level lies as far below that at which the limits hold), and the goal is the
        survivors' mean share x 2^width, so that 0 everywhere follows the importance and spends the
        budget. Where widths are not decided, the share of channels that go is
        max(0, sparsity)^2 [He2018].
        """
        layer = self.layer
        n_pruned = np.zeros(self.n, np.intp)
        shares = self._shares()
        if sparsities is not None and widths is None:
            n_pruned = np.rint(np.maximum(0.0, sparsities) ** 2 * layer.n_genes).astype(np.intp)
        elif sparsities is not None:
            above = PRUNE_SPAN * np.asarray(sparsities, float)
            n_pruned = (self._margins(shares) < above[:, None]).sum(axis=1)
        n_pruned = np.minimum(n_pruned, layer.n_most)
        goals = np.full(self.n, layer.widths[-1])
        if widths is not None:
            goals = self._even_goals(shares, n_pruned) * 2.0 ** np.asarray(widths, float)
        return LayerDecisions(n_pruned, np.clip(goals, layer.lowest_width, layer.widths[-1]))

    def actions_of(self, decisions: LayerDecisions, *, thresholds: bool = True) -> Rows:
        """(n, 2) sparsity and width actions that stand for decisions, as near as [-1, 1] allows.

        Of the actions that prune the same channels it is the one nearest to 0; `thresholds` is
        False where widths are not decided.
        """
        layer, rows = self.layer, np.arange(self.n)
        shares = self._shares()
        if thresholds:
            edges = np.full((self.n, len(layer.going) + 2), np.inf)
            edges[:, 0] = -np.inf
            edges[:, 1:-1] = self._margins(shares)
            # the wall may have taken genes besides, whose removal frees nothing
            n_pruned = np.minimum(decisions.n_pruned, len(layer.going))
            low = edges[rows, n_pruned] + MARGIN
            high = np.maximum(low, edges[rows, n_pruned + 1] - MARGIN)
            sparsity = np.clip(0.0, low, high) / PRUNE_SPAN
        else:
            share = np.sqrt(decisions.n_pruned / layer.n_genes)
            sparsity = np.where(decisions.n_pruned > 0, share, NO_PRUNING)
        even = self._even_goals(shares, decisions.n_pruned)
        width = np.log2(np.maximum(decisions.goals, 1e-3) / even)
        both = np.clip(np.column_stack([sparsity, width]), -1.0, 1.0)
        return np.asarray(both, np.float32)

    def begin_layer(self, decisions: LayerDecisions) -> None:
        """Prune, and split the survivors into rank groups."""
        layer = self.layer
        genes = slice(layer.start, layer.start + layer.n_genes)
        stays = np.arange(len(layer.going)) >= decisions.n_pruned[:, None]
        survivors = np.ones((self.n, layer.n_genes), np.bool_)
        survivors[:, layer.going] = stays
        survivors[self._is_given] = ~self._given[self._is_given, genes]
        self.genomes[:, genes][~survivors] = 0
        self.begin_survivors(decisions.goals, survivors)

    def begin_survivors(self, goals: Floats, survivors: Mask) -> None:
        """Split (n, genes of the layer) survivors into rank groups that get `goals` in the mean."""
        layer = self.layer
        ranked = survivors[:, layer.order]
        n_survivors = ranked.sum(axis=1)
        self._n_parts = np.minimum(self.problem.groups, n_survivors)
        size, larger = np.divmod(n_survivors, np.maximum(self._n_parts, 1))
        size, larger = size[:, None], larger[:, None]
        place = np.cumsum(ranked, axis=1) - 1
        first = larger * (size + 1)  # survivors in the groups that have one more
        part = np.where(
            place < first,
            place // (size + 1),
            larger + (place - first) // np.maximum(size, 1),
        )
        self._part_of = np.full(ranked.shape, -1, np.intp)
        self._part_of[:, layer.order] = np.where(ranked, part, -1)
        member = self._part_of[:, None, :] == np.arange(self.problem.groups)[:, None]
        self._weights = member @ layer.weights
        held = np.maximum(self._weights, 1e-9)
        # groups of equal channels: the mean is over genes, as it is over weights
        self._levels = member @ (layer.weights * layer.prior) / held
        self._scores = member @ layer.scores / np.maximum(member.sum(axis=2), 1)
        self._n_survivors = n_survivors
        self._goals = np.asarray(goals, float)
        self._part = 0
        self._floor = np.full(self.n, layer.first_width, np.intp)
        self._placed = np.zeros((2, self.n))  # weights, and their bits

    @property
    def open(self) -> Mask:
        """(n,) whether there is a rank group left in this layer."""
        return np.asarray(self._part < self._n_parts)

    def channel_observations(self) -> Rows:
        """(n, len(CHANNEL_FIELDS)) in [0, 1], of the next rank group; only `open` rows count."""
        layer, part = self.layer, self._part
        total = np.maximum(self._weights.sum(axis=1), 1e-9)
        return self._rows(
            *self._budget_fields(),
            1 - self._n_survivors / layer.n_genes,
            self._goals / BITS,
            self.needed_widths / BITS,
            part / np.maximum(1, self._n_parts - 1),
            1 - self._placed[0] / total,
            np.log(np.maximum(self._scores[:, part], SCORE_FLOOR)) / 8 + 0.5,
            layer.widths[self._floor] / BITS if part else 0.0,
        )

    @property
    def needed_widths(self) -> Floats:
        """(n,) widths of the next group with which it and later ones meet the goal.

        What the goal leaves, and more or less of it as importance differs between the groups.
        """
        left = self._weights[:, self._part :]
        held = np.maximum(left.sum(axis=1), 1e-9)
        bits = self._goals * self._weights.sum(axis=1) - self._placed[1]
        levels = self._levels[:, self._part :]
        above = levels[:, 0] - (levels * left).sum(axis=1) / held
        return np.asarray(bits / held + above)

    def positions_of(self, actions: Floats) -> Ints:
        """(n,) positions that channel actions in [-1, 1] stand for: needed width + action bits."""
        return self.layer.nearest(self.needed_widths + WIDTH_SPAN * actions, self._floor)

    def channel_actions_of(self, widths: Floats) -> Floats:
        """The actions that stand for (n,) widths of the next group, as near as [-1, 1] allows."""
        return np.asarray(np.clip((widths - self.needed_widths) / WIDTH_SPAN, -1.0, 1.0))

    def place(self, positions: Ints) -> None:
        """Give the next rank group (n,) positions; rows that are not `open` are left alone."""
        mine = self._part_of == self._part
        genes = slice(self.layer.start, self.layer.start + self.layer.n_genes)
        block = self.genomes[:, genes]
        block[mine] = np.broadcast_to(positions[:, None], mine.shape)[mine]
        self._count(self.layer.widths[positions], positions)

    def place_evenly(self) -> None:
        """Give every survivor of the layer the width nearest to the goal."""
        positions = self.layer.nearest(self._goals, np.full(self.n, self.layer.first_width))
        while self.open.any():
            self.place(positions)

    def record(self, positions: Ints) -> None:
        """Give the next group its part of final (n, genes of the layer) positions."""
        mine = self._part_of == self._part
        floor = np.where(mine, positions, 0).max(axis=1)
        self._count(self.followed_widths(positions), floor)

    def followed_widths(self, positions: Ints) -> Floats:
        """(n,) mean widths that (n, genes of the layer) positions give to the next rank group."""
        return mean_widths(self.layer, positions, self._part_of == self._part)

    def settle(self, positions: Ints | None = None, rows: Mask | None = None) -> None:
        """The layer is complete; `rows` of the episodes get final (rows, genes) positions first."""
        if positions is not None:
            genes = slice(self.layer.start, self.layer.start + self.layer.n_genes)
            self.genomes[slice(None) if rows is None else rows, genes] = positions
        self._account()
        self._settle_until_choice()

    @property
    def part_of(self) -> Ints:
        """(n, genes of the layer) number of the rank group of each gene; -1 where it is gone."""
        return self._part_of

    @property
    def goals(self) -> Floats:
        """(n,) mean widths that the layer controller asked of the present layer."""
        return self._goals

    def _count(self, widths: Floats, floors: Ints) -> None:
        weights = self._weights[:, self._part]
        self._placed += np.stack([weights, weights * widths])
        # widths do not fall with importance
        self._floor = np.where(self.open, np.maximum(self._floor, floors), self._floor)
        self._part += 1

    def _shares(self) -> Floats:
        """(n, genes of the layer) bits that importance earns each gene of what is left."""
        return self.problem.shares(self._at, self.even_bits)

    def _margins(self, shares: Floats) -> Floats:
        """(n, genes that may leave) bits that each lies above its threshold, ascending."""
        layer = self.layer
        margins = shares[:, layer.going] - THRESHOLD
        structure = self.problem.structure
        if structure is not None:
            levels = self.problem.structural_levels(self._at, self._missing)
            own = structure.level[layer.start + layer.going]
            margins = np.minimum(margins, own - levels[:, None])
        return np.sort(margins, axis=1)

    @property
    def _frees(self) -> Floats:
        """(genes of the layer,) shares freed of limits that only pruning meets."""
        layer, structure = self.layer, self.problem.structure
        if structure is None:
            return np.zeros(layer.n_genes)
        return structure.frees[layer.start : layer.start + layer.n_genes]

    def _even_goals(self, shares: Floats, n_pruned: Ints) -> Floats:
        """(n,) mean shares of the survivors, at least the narrowest width that keeps them."""
        layer = self.layer
        stays = np.ones(shares.shape, np.bool_)
        stays[:, layer.going] = np.arange(len(layer.going)) >= n_pruned[:, None]
        weights = stays * layer.weights
        kept = np.maximum(shares, layer.lowest_width)
        bits = (kept * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        return np.asarray(np.maximum(bits, max(layer.lowest_width, 1e-3)))

    def _budget_fields(self) -> tuple[Floats, Floats]:
        return self._total_bits / BITS, self.even_bits / BITS

    def _rows(self, *columns: Floats | float) -> Rows:
        static = self.layer.observation
        rows = np.empty((self.n, len(static) + len(columns)), np.float32)
        rows[:, : len(static)] = static
        for number, column in enumerate(columns, start=len(static)):
            rows[:, number] = np.clip(column, 0.0, 1.0)
        return rows

    def _settle_until_choice(self) -> None:
        self._at += 1
        while not self.done and not self.layer.has_choice:
            self._account()
            self._at += 1

    def _account(self) -> None:
        layer, size = self.layer, self.problem.size
        terms = size.layers[self._at]
        size.count_zeros(terms, self.genomes, self._gone)
        self._spent = self._spent + size.layer_bytes(terms, self.genomes, self._gone)
        self._ahead -= layer.n_weights
        mine = self.genomes[:, layer.start : layer.start + layer.n_genes]
        self._missing = self._missing - (mine == 0) @ self._frees
        self._last = shares_and_widths(layer, mine)


def mean_widths(layer: LayerFacts, positions: Ints, among: Mask) -> Floats:
    """(n,) mean widths by weights of the survivors among some genes of a layer; 0 without any."""
    weights = layer.weights * (among & ~layer.is_zero[positions])
    total = weights.sum(axis=1)
    bits = (layer.widths[positions] * weights).sum(axis=1)
    return np.asarray(np.divide(bits, total, out=np.zeros(len(total)), where=total > 0))


def shares_and_widths(layer: LayerFacts, positions: Ints) -> tuple[Floats, Floats]:
    """(share of genes at 0 bits, mean width of the rest by weights) of (n, genes) positions."""
    gone = layer.is_zero[positions]
    return gone.mean(axis=1), mean_widths(layer, positions, np.ones(gone.shape, np.bool_))
