"""A surrogate: an ensemble fitted on the record that screens proposals before any is evaluated."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from agents.problem import Ints, Problem
from agents.reward import FLOOR
from search.strategies.channel_allocation import group_tables
from search.strategies.distortion import measure_table
from search.strategies.surrogate import GeneTable
from search.strategy import Context

_optimize: Any = optimize  # scipy carries no types

Floats = NDArray[np.float64]
RIDGE = 0.3  # how firmly the weights of layers are held at the common ratio
MOST_ROWS = 400  # evaluations that are fitted, the latest
LEAST_ROWS = 6


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
            shares = layer.scores / layer.scores.sum()
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

    Each explains the losses by non-negative weights of the layers, in relative error, and what is
    left by a parabola in log size: losses stop adding up where networks break.

    Args:
        problem: for the estimate of sizes.
        law: what genes add.
        members: how many.
    """

    def __init__(self, problem: Problem, law: Law, members: int) -> None:
        self._problem = problem
        self._law = law
        self._n = members
        self._members: list[tuple[Floats, Floats]] = []
        self._centre, self._range = 0.0, (0.0, 0.0)

    @property
    def is_fitted(self) -> bool:
        """Whether there was enough to learn from."""
        return bool(self._members)

    def fit(
        self, genomes: Ints, losses: Floats, sizes: Floats, generator: np.random.Generator
    ) -> None:
        """Fit on (n, genes) positions, (n,) finite losses and (n,) exact bytes, the latest last."""
        rows = self._law.features(genomes[-MOST_ROWS:])
        losses = np.maximum(losses[-MOST_ROWS:], FLOOR)
        sizes = np.log2(sizes[-MOST_ROWS:])
        if len(losses) < LEAST_ROWS:
            return
        self._centre, self._range = float(sizes.mean()), (float(sizes.min()), float(sizes.max()))
        self._members = []
        for _ in range(self._n):
            trust = generator.exponential(size=len(losses))
            weights = _weights(rows, losses, trust)
            left = np.log(losses) - np.log(np.maximum(rows @ weights, 1e-12))
            basis = _basis(sizes - self._centre) * np.sqrt(trust)[:, None]
            square = basis.T @ basis + 0.1 * np.eye(basis.shape[1])
            bend = np.linalg.solve(square, basis.T @ (left * np.sqrt(trust)))
            self._members.append((weights, bend))

    def log_losses(self, genomes: Ints, member: int) -> Floats:
        """(n, genes) positions to (n,) predicted ln(loss) of one member."""
        weights, bend = self._members[member % self._n]
        sizes = np.log2([self._problem.size.estimate(g) for g in genomes])
        octaves = np.clip(sizes, *self._range) - self._centre  # a parabola is no guide beyond
        total = np.maximum(self._law.features(genomes) @ weights, 1e-12)
        return np.asarray(np.log(total) + _basis(octaves) @ bend)


def _weights(rows: Floats, losses: Floats, trust: Floats) -> Floats:
    """Non-negative least squares on relative errors, held at the common ratio by a ridge."""
    ratio = losses / np.maximum(rows.sum(axis=1), 1e-12)
    common = float(np.exp(np.average(np.log(ratio), weights=trust)))
    n_groups = rows.shape[1]
    factor = np.sqrt(trust)
    scaled = rows * common / losses[:, None] * factor[:, None]
    design = np.vstack([scaled, np.sqrt(RIDGE) * np.eye(n_groups)])
    target = np.concatenate([factor, np.full(n_groups, np.sqrt(RIDGE))])
    found, _ = _optimize.nnls(design, target)
    return np.asarray(common * np.maximum(found, 0.02))


def _basis(octaves: Floats) -> Floats:
    return np.column_stack([np.ones_like(octaves), octaves, octaves**2])
