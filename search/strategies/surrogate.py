"""The distortion table corrected by what was measured of whole candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from search.evaluation import Evaluation
from search.space import SearchSpace
from search.strategies.distortion import DistortionTable

_optimize: Any = optimize  # scipy carries no types

RIDGE = 0.3  # how firmly the weights are held at the common ratio
OCTAVES = 0.7  # evaluations within about this factor of two in size count


@dataclass(frozen=True)
class GeneTable:
    """The table per gene: a layer's loss and bytes are shared evenly, unless told otherwise."""

    group_of: NDArray[np.intp]
    losses: tuple[NDArray[np.float64], ...]
    sizes: tuple[NDArray[np.float64], ...]
    base_size: float

    @classmethod
    def of(cls, table: DistortionTable) -> "GeneTable":
        """From one group per layer and edge to one gene per channel group and edge."""
        space = table.space
        n_genes = [choice.n_genes for choice in space.layers] + [1] * len(space.activations)
        group_of = np.repeat(np.arange(len(n_genes)), n_genes)
        sizes = table.costs["size_bytes"]
        return cls(
            group_of,
            tuple(table.losses[g] / n_genes[g] for g in group_of),
            tuple(sizes[g] / n_genes[g] for g in group_of),
            table.base_costs["size_bytes"],
        )

    def with_losses(self, losses: Mapping[int, NDArray[np.float64]]) -> "GeneTable":
        """The table with other losses for some genes."""
        return replace(
            self, losses=tuple(losses.get(gene, loss) for gene, loss in enumerate(self.losses))
        )

    def loss_by_group(self, genome: Sequence[int]) -> NDArray[np.float64]:
        """(groups,): what each layer and edge adds to the loss."""
        values = [loss[at] for loss, at in zip(self.losses, genome, strict=True)]
        return np.bincount(self.group_of, weights=values).astype(np.float64)

    def size(self, genome: Sequence[int]) -> float:
        """Bytes as a sum."""
        return self.base_size + float(
            sum(size[at] for size, at in zip(self.sizes, genome, strict=True))
        )


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
