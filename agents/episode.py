"""One candidate in the making: what the controllers see, and what their actions mean.

An action is a number in [-1, 1] and a decision is what it means under the present budget. Both
ways are here: from an action to a decision while rolling out, and from a decision back to the
action that would have made it, under any budget, for hindsight and demonstrations.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.problem import STATIC_FIELDS, Ints, LayerFacts, Problem

Row = NDArray[np.float32]

WIDTH_SPAN = 2.0  # bits that the channel controller's action moves a group from what is needed
NO_PRUNING = -0.25  # canonical action where nothing is pruned: every negative one prunes nothing
BITS = 8.0

LAYER_FIELDS = (
    *STATIC_FIELDS,
    "budget",  # mean bits per weight of the network that the budget allows / 8
    "even",  # mean bits per weight that is left for this and later layers / 8
    "spent",  # estimated bytes of earlier layers / budget
    "ahead",  # share of the weights in this and later layers
    "last_sparsity",  # share of genes that the previous step pruned
    "last_width",  # mean width of its survivors / 8
)
CHANNEL_FIELDS = (
    *STATIC_FIELDS,
    "budget",  # as above
    "even",  # as above
    "sparsity",  # share of this layer's genes that were pruned
    "goal",  # mean width that the layer controller asked for / 8
    "needed",  # mean width that this and later groups need to meet the goal / 8
    "rank",  # number of the group / number of groups - 1
    "ahead",  # share of the survivors' weights in this and later groups
    "importance",  # natural logarithm of the group's mean importance / 8 + 1/2
    "last_width",  # width of the group before / 8
)


@dataclass(frozen=True, slots=True)
class LayerDecision:
    """What the layer controller decides: how many genes go, and the survivors' mean width."""

    n_pruned: int
    goal: float


class Episode:
    """Layers in execution order; in each, rank groups of survivors from least important on.

    Args:
        problem: the constants.
        budget_bytes: what the candidate may take.
        zeros: (genes,) genes that are gone from the start; None leaves that to the decisions.
    """

    def __init__(
        self, problem: Problem, budget_bytes: float, zeros: NDArray[np.bool_] | None = None
    ) -> None:
        self.problem = problem
        self.budget_bytes = budget_bytes
        self.genome: Ints = problem.widest.copy()
        self._zeros = zeros
        self._total_bits = 8 * (budget_bytes - problem.size.fixed) / problem.n_weights
        self._gone = np.zeros(problem.size.n_components)
        self._spent = problem.size.fixed
        self._ahead = problem.n_weights
        self._last = (0.0, 1.0)
        self._at = -1
        self._goal = BITS
        self._parts: list[Ints] = []
        self._part = self._floor = self._n_survivors = 0
        self._part_weights: list[float] = []
        self._placed_weights = self._placed_bits = 0.0
        self._settle_until_choice()

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
    def even_bits(self) -> float:
        """Mean bits per weight that is left for this and later layers."""
        left = 8 * (self.budget_bytes - self._spent)
        return min(max(left / max(self._ahead, 1.0), 0.25), 16.0)

    def layer_observation(self) -> Row:
        """(len(LAYER_FIELDS),) in [0, 1]."""
        values = (
            *self._budget_fields(),
            self._spent / self.budget_bytes,
            self._ahead / self.problem.n_weights,
            self._last[0],
            self._last[1] / BITS,
        )
        return _row(self.layer, values)

    def channel_observation(self) -> Row:
        """(len(CHANNEL_FIELDS),) in [0, 1], of the next rank group."""
        layer, part = self.layer, self._part
        values = (
            *self._budget_fields(),
            1 - self._n_survivors / layer.n_genes,
            self._goal / BITS,
            self.needed_width / BITS,
            part / max(1, len(self._parts) - 1),
            1 - self._placed_weights / sum(self._part_weights),
            math.log(max(float(layer.scores[self._parts[part]].mean()), 1e-6)) / 8 + 0.5,
            float(layer.widths[self._floor]) / BITS if part else 0.0,
        )
        return _row(layer, values)

    @property
    def needed_width(self) -> float:
        """Mean width that this and later rank groups need to meet the goal."""
        total = sum(self._part_weights)
        return (self._goal * total - self._placed_bits) / (total - self._placed_weights)

    def decision_of(self, sparsity: float | None, width: float | None) -> LayerDecision:
        """The decision that actions in [-1, 1] stand for; None prunes nothing, or is widest.

        Share pruned = max(0, action)^2; goal = even bits x 2^action, so that 0 everywhere
        spends the budget evenly.
        """
        layer = self.layer
        n_pruned = 0
        if sparsity is not None:
            wanted = round(max(0.0, sparsity) ** 2 * layer.n_genes)
            n_pruned = min(layer.n_most, wanted)
        goal = float(layer.widths[-1])
        if width is not None:
            goal = self.even_bits * 2.0**width
        low, high = layer.widths[layer.first_width], layer.widths[-1]
        return LayerDecision(n_pruned, min(max(goal, float(low)), float(high)))

    def action_of(self, decision: LayerDecision) -> tuple[float, float]:
        """(sparsity, width) actions that stand for a decision, as near as [-1, 1] allows."""
        sparsity = NO_PRUNING
        if decision.n_pruned:
            sparsity = min(1.0, math.sqrt(decision.n_pruned / self.layer.n_genes))
        width = math.log2(max(decision.goal, 1e-3) / self.even_bits)
        return sparsity, min(max(width, -1.0), 1.0)

    def begin_layer(self, decision: LayerDecision) -> None:
        """Prune, and split the survivors into rank groups; without survivors the layer ends."""
        layer = self.layer
        order = layer.order
        if self._zeros is None:
            gone = order[layer.prunable[order]][: decision.n_pruned]
        else:
            gone = np.flatnonzero(self._zeros[layer.start : layer.start + layer.n_genes])
        self.genome[layer.start + gone] = 0
        stays = np.ones(layer.n_genes, np.bool_)
        stays[gone] = False
        self.begin_survivors(decision.goal, np.flatnonzero(stays))
        if not self._parts:
            self._settle()

    def begin_survivors(self, goal: float, survivors: Ints) -> None:
        """Split the survivors into rank groups that are to get `goal` bits in the mean."""
        order = self.layer.order
        stays = np.zeros(len(order), np.bool_)
        stays[survivors] = True
        ranked = order[stays[order]]
        n = min(self.problem.groups, len(ranked))
        self._parts = list(np.array_split(ranked, n)) if n else []
        self._part_weights = [float(self.layer.weights[part].sum()) for part in self._parts]
        self._n_survivors = len(ranked)
        self._part = self._floor = 0
        self._placed_weights = self._placed_bits = 0.0
        self._goal = goal

    def width_of(self, action: float) -> int:
        """Position that a channel action in [-1, 1] stands for: needed width + 2 x action."""
        return self.layer.nearest(self.needed_width + WIDTH_SPAN * action, self._floor)

    def channel_action_of(self, width: float) -> float:
        """The action that stands for a width of the next group, as near as [-1, 1] allows."""
        action = (width - self.needed_width) / WIDTH_SPAN
        return min(max(action, -1.0), 1.0)

    def place(self, position: int) -> bool:
        """Give the next rank group a width; True when the layer is complete."""
        self._put(position, float(self.layer.widths[position]))
        if self._part < len(self._parts):
            return False
        self._settle()
        return True

    def place_all(self, position: int) -> None:
        """Give every survivor of the layer the same width."""
        while not self.place(position):
            pass

    def overwrite(self, genes: Ints) -> None:
        """Replace the layer's decision so far by its final positions; the layer is complete."""
        layer = self.layer
        self.genome[layer.start : layer.start + layer.n_genes] = genes
        self._settle()

    @property
    def parts(self) -> list[Ints]:
        """Genes of the layer's rank groups, least important first."""
        return self._parts

    @property
    def goal(self) -> float:
        """Mean width that the layer controller asked of the present layer."""
        return self._goal

    def followed_width(self, positions: Ints) -> float:
        """Mean width that a layer's positions give to the survivors of the next rank group."""
        part = self._parts[self._part]
        return mean_width(self.layer, part, positions[part])

    def record_widths(self, positions: Ints) -> None:
        """Give the next rank group its final positions, while a decision is retraced."""
        self._put(positions, mean_width(self.layer, self._parts[self._part], positions))

    def _put(self, positions: Ints | int, width: float) -> None:
        part, weights = self._parts[self._part], self._part_weights[self._part]
        self.genome[self.layer.start + part] = positions
        self._placed_weights += weights
        self._placed_bits += weights * width
        # widths do not fall with importance
        self._floor = int(np.max(positions))
        self._part += 1

    def _budget_fields(self) -> tuple[float, float]:
        return self._total_bits / BITS, self.even_bits / BITS

    def _settle(self) -> None:
        """Account for the layer and go to the next one that has a choice."""
        self._account()
        self._settle_until_choice()

    def _settle_until_choice(self) -> None:
        self._at += 1
        while not self.done and not self.layer.has_choice:
            self._account()
            self._at += 1

    def _account(self) -> None:
        layer, size = self.layer, self.problem.size
        terms = size.layers[self._at]
        size.count_zeros(terms, self.genome, self._gone)
        self._spent += size.layer_bytes(terms, self.genome, self._gone)
        self._ahead -= layer.n_weights
        positions = self.genome[layer.start : layer.start + layer.n_genes]
        self._last = share_and_width(layer, positions)


def mean_width(layer: LayerFacts, genes: Ints, positions: Ints) -> float:
    """Mean width by weights of the survivors among some genes of a layer; 0 without any."""
    weights = layer.weights[genes] * ~layer.is_zero[positions]
    total = float(weights.sum())
    return float(layer.widths[positions] @ weights) / total if total else 0.0


def share_and_width(layer: LayerFacts, positions: Ints) -> tuple[float, float]:
    """(share of genes at 0 bits, mean width of the rest by weights) of one layer's positions."""
    n_gone = int(layer.is_zero[positions].sum())
    return n_gone / layer.n_genes, mean_width(layer, np.arange(layer.n_genes), positions)


def _row(layer: LayerFacts, values: tuple[float, ...]) -> Row:
    row = np.empty(len(layer.observation) + len(values), np.float32)
    row[: len(layer.observation)] = layer.observation
    row[len(layer.observation) :] = [min(max(v, 0.0), 1.0) for v in values]
    return row
