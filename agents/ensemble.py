"""A surrogate: an ensemble fitted on the record that screens proposals before any is evaluated."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from agents.layer_facts import Ints
from agents.problem import Problem
from agents.reward import FLOOR
from search.strategies.channel_allocation import group_tables
from search.strategies.distortion import measure_table
from search.strategies.surrogate import GeneTable
from search.strategy import Context

_optimize: Any = optimize  # scipy carries no types

Floats = NDArray[np.float64]
RIDGE = 1.0  # how firmly the weights of layers are held at the common ratio
NEAR_OCTAVES = 0.7  # standard deviation of the sizes that a prediction is fitted on
LEAST_WEIGHT = 0.02  # of a layer, beside its prior: none is taken to be free
FAR = 0.02  # weight of an evaluation of any other size
MOST_ROWS = 400  # evaluations that are fitted, the latest
LEAST_ROWS = 6
TINY = 1e-12


class Law:
    """What every gene at every width adds to its layer's share of the loss.

    Args:
        losses: per gene its losses at the legal widths.
        group_of: (genes,) number of the layer or edge of each.
    """

    def __init__(self, losses: Sequence[Floats], group_of: Ints) -> None:
        self._table = np.zeros((len(losses), max(len(x) for x in losses)))
        for gene, values in enumerate(losses):
            self._table[gene, : len(values)] = values
        self._genes = np.arange(len(losses))
        self._starts = np.flatnonzero(np.diff(group_of, prepend=-1))

    @classmethod
    def of_importance(cls, problem: Problem) -> "Law":
        """Importance x 4^-width: nothing needs to be measured."""
        losses: list[Floats] = []
        groups: list[int] = []
        for number, layer in enumerate(problem.layers):
            shares = layer.importance * layer.scores / layer.scores.sum()
            losses += [share * 4.0**-layer.widths for share in shares]
            groups += [number] * layer.n_genes
        for number, edge in enumerate(problem.space.activations, start=len(problem.layers)):
            losses.append(4.0 ** -np.array(edge.bit_widths, float))
            groups.append(number)
        return cls(losses, np.array(groups, np.intp))

    @classmethod
    def of_table(cls, context: Context) -> "Law":
        """From the distortion table, which rate-distortion measured before."""
        table = measure_table(context)
        genes = GeneTable.of(table)
        if any(choice.groups for choice in context.space.layers):
            groups, numbers = group_tables(context, table)
            genes = genes.with_losses(
                dict(zip(numbers, (group.losses for group in groups), strict=True))
            )
        return cls(genes.losses, genes.group_of)

    def features(self, genomes: Ints) -> Floats:
        """(n, genes) positions to (n, groups): what each layer and edge adds."""
        values = self._table[self._genes, genomes]
        return np.asarray(np.add.reduceat(values, self._starts, axis=1))


class Ensemble:
    """Members differ by how much weight each evaluation has (a Bayesian bootstrap).

    Around a size, losses are explained by non-negative weights of the layers, in relative error,
    times e to a parabola in log size: losses stop adding up where networks break, and which
    layers matter changes on the way there.

    Args:
        problem: for the estimate of sizes.
        law: what genes add.
        members: how many.
    """

    def __init__(self, problem: Problem, law: Law, members: int) -> None:
        self._problem = problem
        self._law = law
        self._n = members
        self._rows: Floats = np.zeros((0, 1))
        self._losses: Floats = np.zeros(0)
        self._octaves: Floats = np.zeros(0)
        self._trust: Floats = np.zeros((members, 0))

    @property
    def is_fitted(self) -> bool:
        """Whether there was enough to learn from."""
        return len(self._losses) >= LEAST_ROWS

    def fit(
        self, genomes: Ints, losses: Floats, sizes: Floats, generator: np.random.Generator
    ) -> None:
        """Take (n, genes) positions, (n,) finite losses and (n,) exact bytes, the latest last."""
        self._rows = self._law.features(genomes[-MOST_ROWS:])
        self._losses = np.maximum(losses[-MOST_ROWS:], FLOOR)
        self._octaves = np.log2(sizes[-MOST_ROWS:])
        self._trust = generator.exponential(size=(self._n, len(self._losses)))

    def log_losses(self, genomes: Ints, member: int, size_bytes: float) -> Floats:
        """(n, genes) positions of about `size_bytes` to (n,) ln(loss) as one member predicts it."""
        centre = math.log2(size_bytes)
        distance = (self._octaves - centre) / NEAR_OCTAVES
        trust = self._trust[member % self._n] * (np.exp(-0.5 * distance**2) + FAR)
        common = np.ones(self._rows.shape[1])
        basis = _basis(self._octaves - centre)
        bend = basis @ self._bend(basis, common, trust)
        weights = _weights(self._rows * np.exp(bend)[:, None], self._losses, trust)
        parabola = self._bend(basis, weights, trust)
        # a parabola is no guide beyond what it was fitted on
        octaves = np.log2(self._problem.size.estimate(genomes))
        octaves = np.clip(octaves, self._octaves.min(), self._octaves.max()) - centre
        total = np.maximum(self._law.features(genomes) @ weights, TINY)
        return np.asarray(np.log(total) + _basis(octaves) @ parabola)

    def _bend(self, basis: Floats, weights: Floats, trust: Floats) -> Floats:
        """(3,) coefficients of what the sum of the layers leaves unexplained."""
        left = np.log(self._losses) - np.log(np.maximum(self._rows @ weights, TINY))
        weighed = basis * trust[:, None]
        square = weighed.T @ basis + 0.1 * np.eye(basis.shape[1])
        return np.asarray(np.linalg.solve(square, weighed.T @ left))


def _weights(rows: Floats, losses: Floats, trust: Floats) -> Floats:
    """Non-negative least squares on relative errors, held at 1 by a ridge."""
    n_groups = rows.shape[1]
    factor = np.sqrt(trust)
    design = np.vstack(
        [rows / losses[:, None] * factor[:, None], np.sqrt(RIDGE) * np.eye(n_groups)]
    )
    target = np.concatenate([factor, np.full(n_groups, np.sqrt(RIDGE))])
    found, _ = _optimize.nnls(design, target)
    return np.asarray(np.maximum(found, LEAST_WEIGHT))


def _basis(octaves: Floats) -> Floats:
    return np.column_stack([np.ones_like(octaves), octaves, octaves**2])
