"""The distortion table corrected by what was measured of whole candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from search.evaluation import Evaluation
from search.space import SearchSpace
from search.strategies.distortion import DistortionTable, Group

_optimize: Any = optimize  # scipy carries no types

RIDGE = 0.3  # how firmly the weights are held at the common ratio
OCTAVES = 0.7  # evaluations within about this factor of two in size count


@dataclass(frozen=True)
class GeneTable:
    """The table per gene: a layer's loss and bytes are shared evenly, unless told otherwise.

    Attributes:
        group_of: (genes,) number of the gene's group.
        losses: per gene (positions,); of a layer with a residual and of the residual itself
            (positions, positions of the other).
        sizes: per gene (positions,) bytes more than `base_size`.
        base_size: bytes of the candidate that sizes are differences from.
        partner: gene of a layer to that of its residual, and back.
    """

    group_of: NDArray[np.intp]
    losses: tuple[NDArray[np.float64], ...]
    sizes: tuple[NDArray[np.float64], ...]
    base_size: float
    partner: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: DistortionTable) -> "GeneTable":
        """From one group per layer and edge to one gene per channel group and edge."""
        rows: dict[int, tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}
        partner: dict[int, int] = {}
        per_group = zip(table.groups, table.losses, table.costs["size_bytes"], strict=True)
        for number, (group, losses, sizes) in enumerate(per_group):
            tables = (
                _pair_tables(group, losses, sizes) if len(group.names) > 1 else [(losses, sizes)]
            )
            for (first, n_genes), (loss, size) in zip(group.genes, tables, strict=True):
                for gene in range(first, first + n_genes):
                    rows[gene] = (number, loss / n_genes, size / n_genes)
            if len(group.names) > 1:
                (main, n_genes), (residual, _) = group.genes
                pairs = [(main + i, residual + i) for i in range(n_genes)]
                partner |= dict(pairs) | {b: a for a, b in pairs}
        ordered = [rows[gene] for gene in sorted(rows)]
        return cls(
            np.array([number for number, _, _ in ordered], np.intp),
            tuple(loss for _, loss, _ in ordered),
            tuple(size for _, _, size in ordered),
            table.base_costs["size_bytes"],
            partner,
        )

    def with_losses(self, losses: Mapping[int, NDArray[np.float64]]) -> "GeneTable":
        """The table with other losses for some genes; pairs keep theirs."""
        found = (
            loss if gene in self.partner else losses.get(gene, loss)
            for gene, loss in enumerate(self.losses)
        )
        return replace(self, losses=tuple(found))

    def losses_at(self, gene: int, genome: Sequence[int]) -> NDArray[np.float64]:
        """(positions,): losses of one gene, all others being as in the genome."""
        loss = self.losses[gene]
        return loss[:, genome[self.partner[gene]]] if gene in self.partner else loss

    def loss_by_group(self, genome: Sequence[int]) -> NDArray[np.float64]:
        """(groups,): what each layer and edge adds to the loss."""
        values = [
            0.0 if self.partner.get(gene, gene) < gene else self.losses_at(gene, genome)[at]
            for gene, at in enumerate(genome)
        ]
        return np.bincount(self.group_of, weights=values).astype(np.float64)

    def size(self, genome: Sequence[int]) -> float:
        """Bytes as a sum."""
        return self.base_size + float(
            sum(size[at] for size, at in zip(self.sizes, genome, strict=True))
        )


def _pair_tables(
    group: Group, losses: NDArray[np.float64], sizes: NDArray[np.float64]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Losses (own positions, the other's) and bytes (own positions) of a layer and its residual.

    What is not a choice has the loss of the two widths the other way round, or else of the layer
    alone. Bytes add up.
    """
    main, residual = group.widths
    at = {choice: number for number, choice in enumerate(group.choices)}
    number_of = {(main[i], residual[j]): n for (i, j), n in at.items()}
    known = [
        [
            number_of.get((wide, narrow), number_of.get((narrow, wide), at[i, 0]))
            for narrow in residual
        ]
        for i, wide in enumerate(main)
    ]
    both = losses[np.array(known)]
    last = len(main) - 1
    alone = np.array([sizes[at[i, 0]] - sizes[at[last, 0]] for i in range(len(main))])
    beside = [sizes[at[last, j]] if (last, j) in at else sizes[-1] for j in range(len(residual))]
    return [(both, alone), (both.T, np.array(beside))]


def fitted_weights(
    space: SearchSpace, table: GeneTable, evaluations: Sequence[Evaluation], size_bytes: float
) -> NDArray[np.float64]:
    """(groups,): factors on the groups' losses that explain the measured losses near a size.

    Non-negative least squares on relative errors, evaluations weighted by their distance in
    log2(size), held by a ridge at the median ratio of measured to predicted. A stopped evaluation
    counts at its estimate: its bound would make bad candidates look better than they are.
    """
    used = [e for e in evaluations if np.isfinite(e.loss) and e.loss > 0 and not e.recipe]
    rows = np.array([table.loss_by_group(space.encode(e.candidate)) for e in used])
    if not rows.size or not (rows.sum(axis=1) > 0).any():
        return np.ones(int(table.group_of.max()) + 1)
    keep = rows.sum(axis=1) > 0
    rows = rows[keep]
    losses = np.array([e.estimated_loss for e in used])[keep]
    octaves = np.log2(np.array([e.size_bytes for e in used])[keep] / size_bytes)
    nearness = np.exp(-0.5 * (octaves / OCTAVES) ** 2) + 1e-6
    order = np.argsort(losses / rows.sum(axis=1))
    middle = np.searchsorted(np.cumsum(nearness[order]), nearness.sum() / 2)
    common = float((losses / rows.sum(axis=1))[order[middle]])
    n_groups = rows.shape[1]
    scaled = rows * common / losses[:, None] * np.sqrt(nearness)[:, None]
    design = np.vstack([scaled, np.sqrt(RIDGE) * np.eye(n_groups)])
    target = np.concatenate([np.sqrt(nearness), np.full(n_groups, np.sqrt(RIDGE))])
    weights, _ = _optimize.nnls(design, target)
    held: NDArray[np.float64] = np.maximum(weights, 0.05)
    return common * held
