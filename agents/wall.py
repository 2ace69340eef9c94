"""The budget wall: what makes every episode legal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.problem import Ints, Problem
from search.evaluation import within
from search.strategy import Context

CORRECTIONS = 4  # how often the estimate is put right by an exact size before it is left aside
CLOSE = 0.998  # of the budget: near enough to stop correcting


@dataclass(frozen=True, eq=False)
class Path:
    """A genome, and genes that lose one position each, in order; `ends` closes every step."""

    genome: Ints
    genes: Ints
    ends: Ints

    @classmethod
    def of(cls, genome: Ints, steps: Sequence[Ints]) -> "Path":
        """From the genes of every step."""
        genes = np.concatenate([np.zeros(0, np.intp), *steps]).astype(np.intp)
        return cls(genome, genes, np.cumsum([0, *(len(step) for step in steps)]))

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.ends) - 1

    def after(self, n: int) -> Ints:
        """The genome after `n` steps."""
        taken = np.bincount(self.genes[: self.ends[n]], minlength=len(self.genome))
        return np.asarray(self.genome - taken, dtype=np.intp)


class Wall:
    """Takes bits away from the least important genes until every budget holds.

    One pass goes from the least important gene of the network to the most important one and
    takes one position off each, down to 0 bits where it may leave; passes repeat. Only where
    that is not enough, genes whose removal frees no slot go too. A genome that fits is left
    as it is.

    Args:
        problem: the constants.
        order: "bits" as described; "channels" takes whole genes away and leaves widths alone;
            "layers" takes one position off whole layers, from the last to the first [Wang2019],
            and prunes only where no widths are left to take.
    """

    def __init__(self, problem: Problem, order: str = "bits") -> None:
        self._problem = problem
        self._order = order
        self._floor, self._bottom = _floors(problem, keeps_channels=order == "layers")
        scores = [layer.scores for layer in problem.layers]
        n_edges = len(problem.space.activations)
        self._ascending = np.argsort(
            np.concatenate([*scores, np.full(n_edges, np.inf)]), kind="stable"
        )
        self._layers = [
            np.arange(layer.start, layer.start + layer.n_genes)
            for layer in reversed(problem.layers)
        ]

    def estimated(self, genome: Ints, budget_bytes: float) -> Ints:
        """The genome inside `budget_bytes` by the estimate alone, or as small as it gets."""
        path = self._path(genome)
        return path.after(self._steps_to(path, budget_bytes))

    def lower(self, context: Context, genome: Ints, limits: Mapping[str, float]) -> tuple[int, ...]:
        """The genome inside every limit (cost name to limit); the smallest one if none fits."""
        space = self._problem.space
        path = self._path(genome)

        def fits(n: int) -> bool:
            return within(limits, context.cost_of(space.decode(path.after(n).tolist())))

        n = None
        if set(limits) == {"size_bytes"}:
            n = self._by_estimate(context, path, limits["size_bytes"])
        if n is None:
            n = _bisect(fits, path.n_steps)
        if n is None:
            return space.encode(space.smallest())
        return tuple(path.after(n).tolist())

    def _by_estimate(self, context: Context, path: Path, limit: float) -> int | None:
        """How many steps it takes, by the estimate corrected with a few exact sizes."""
        space, size, offset = self._problem.space, self._problem.size, 0.0
        best: int | None = None
        for _ in range(CORRECTIONS):
            n = self._steps_to(path, limit - offset)
            genome = path.after(n)
            exact = context.size_of(space.decode(genome.tolist()))
            if exact <= limit and (best is None or n < best):
                best = n
            if best is not None and (n == 0 or exact > CLOSE * limit):
                break
            offset = exact - size.estimate(genome)
        return best

    def _steps_to(self, path: Path, size_bytes: float) -> int:
        """The fewest steps to an estimate of `size_bytes`; all of them if that is not reached."""
        size = self._problem.size
        n = _bisect(lambda n: size.estimate(path.after(n)) <= size_bytes, path.n_steps)
        return path.n_steps if n is None else n

    def _path(self, genome: Ints) -> Path:
        """First down to the floors, then to the bottom."""
        low = np.minimum(genome, self._floor)
        bottom = np.minimum(low, self._bottom)
        return Path.of(genome, [*self._passes(genome, low), *self._passes(low, bottom)])

    def _passes(self, genome: Ints, low: Ints) -> list[Ints]:
        room = genome - low
        if self._order == "channels":
            going = self._ascending[(room > 0)[self._ascending] & (low == 0)[self._ascending]]
            return [np.repeat(gene, room[gene]) for gene in going]
        steps: list[Ints] = []
        for taken in range(int(room.max(initial=0))):
            if self._order == "layers":
                blocks = (block[room[block] > taken] for block in self._layers)
                steps += [block for block in blocks if len(block)]
            else:
                left = self._ascending[room[self._ascending] > taken]
                steps += list(left[:, None])
        return steps


def _floors(problem: Problem, *, keeps_channels: bool) -> tuple[Ints, Ints]:
    """Per gene the lowest position that makes sense, and the lowest legal one."""
    widest = problem.widest
    floor, bottom = widest.copy(), np.zeros(len(widest), np.intp)
    for layer, choice in zip(problem.layers, problem.space.layers, strict=True):
        genes = slice(layer.start, layer.start + layer.n_genes)
        leaves = layer.prunable & (not keeps_channels)
        floor[genes] = np.where(leaves, 0, layer.first_width)
        if layer.n_most < layer.n_genes and layer.prunable.all():
            floor[layer.start + layer.order[-1]] = layer.first_width
        if choice.groups and not choice.may_vanish:
            bottom[layer.start + layer.order[-1]] = layer.first_width
    return floor, bottom


def _bisect(fits: Callable[[int], bool], n_steps: int) -> int | None:
    """The fewest steps after which it fits, taking it for monotone; None if it never does."""
    if fits(0):
        return 0
    if not n_steps or not fits(n_steps):
        return None
    low, high = 0, n_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
