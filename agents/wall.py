"""The budget wall: what makes every episode legal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.layer_facts import Floats, Ints
from agents.problem import Problem
from search.evaluation import within
from search.strategy import Context

CORRECTIONS = 4  # how often the estimate is put right by an exact size before it is left aside
CLOSE = 0.998  # of the budget: near enough to stop correcting
ROUGH = 8  # steps of one position, of thousands: near enough for a proposal
SIDE_BY_SIDE = 48  # genomes
EDGES_LAST = 100.0  # bits: activations narrow only where no weights are left to narrow


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

    @classmethod
    def one_by_one(cls, genome: Ints, genes: Ints) -> "Path":
        """Every gene is a step."""
        return cls(genome, genes, np.arange(len(genes) + 1))

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.ends) - 1

    def after(self, n: int) -> Ints:
        """The genome after `n` steps."""
        taken = np.bincount(self.genes[: self.ends[n]], minlength=len(self.genome))
        return np.asarray(self.genome - taken, dtype=np.intp)


class Wall:
    """Takes bits away where importance values them least until every budget holds.

    Each step takes one position off the gene whose width lies farthest above its prior, down to
    0 bits where it may leave. Only where that is not enough, genes whose removal frees no slot
    go too. A genome that fits is left as it is; `filled` spends what a genome leaves over.

    Args:
        problem: the constants.
        order: "bits" as described; "channels" takes whole genes away, least important first,
            and leaves widths alone;
            "layers" takes one position off whole layers, from the last to the first [Wang2019],
            and prunes only where no widths are left to take.
    """

    def __init__(self, problem: Problem, order: str = "bits") -> None:
        self._problem = problem
        self._order = order
        self._floor, self._bottom = _floors(problem, keeps_channels=order == "layers")
        scores = [layer.scores for layer in problem.layers]
        n_edges = len(problem.space.activations)
        self._excess = _excess(problem)
        self._ascending = np.argsort(
            np.concatenate([*scores, np.full(n_edges, np.inf)]), kind="stable"
        )
        self._layers = [
            np.arange(layer.start, layer.start + layer.n_genes)
            for layer in reversed(problem.layers)
        ]

    def filled(self, genomes: Ints, budgets: Floats) -> Ints:
        """(n, genes) genomes at (n,) bytes by the estimate, or as near to them as they get.

        What is over is taken away, of limits that only pruning meets first. What is left is
        spent, each step on the surviving gene whose next width lies farthest below its prior;
        orders but "bits" leave it unspent.
        """
        if self._problem.structure is not None:
            genomes = self._problem.structure.trimmed(genomes)
        over = self._problem.size.estimate(genomes) > budgets
        out = genomes.copy()
        if over.any():
            paths = [self._path(genome) for genome in genomes[over]]
            out[over] = _after(paths, self._steps_to(paths, budgets[over], ROUGH))
        if self._order == "bits" and not over.all():
            out[~over] = self._raised(genomes[~over], budgets[~over])
        return out

    def _raised(self, genomes: Ints, budgets: Floats) -> Ints:
        n_genes = len(self._problem.widest) - len(self._problem.space.activations)
        tops = genomes.copy()
        survives = (genomes > 0) | (self._problem.narrowest > 0)
        tops[:, :n_genes] = np.where(survives, self._problem.widest, genomes)[:, :n_genes]
        paths = [
            Path.one_by_one(top, self._by_excess(top, genome))
            for top, genome in zip(tops, genomes, strict=True)
        ]
        return _after(paths, self._steps_to(paths, budgets, ROUGH))

    def lower(self, context: Context, genome: Ints, limits: Mapping[str, float]) -> tuple[int, ...]:
        """The genome inside every limit (cost name to limit); the smallest one if none fits."""
        space = self._problem.space
        if self._problem.structure is not None:
            mine = {k: v for k, v in limits.items() if k in self._problem.structure.costs}
            genome, held = self._without_sets(context, genome, mine)
            if held:  # and what else is taken away frees still more
                limits = {k: v for k, v in limits.items() if k not in mine}
        path = self._path(genome)

        def fits(n: int) -> bool:
            return within(limits, context.cost_of(space.decode(path.after(n).tolist())))

        n = None if limits else 0
        if set(limits) == {"size_bytes"}:
            n = self._by_estimate(context, path, limits["size_bytes"])
        if n is None:
            n = _bisect(fits, path.n_steps)
        if n is None:
            return space.encode(space.smallest())
        return tuple(path.after(n).tolist())

    def _without_sets(
        self, context: Context, genome: Ints, limits: Mapping[str, float]
    ) -> tuple[Ints, bool]:
        """The genome with sets of channels removed until the limits hold, and whether they do."""
        structure, space = self._problem.structure, self._problem.space
        assert structure is not None
        genome = np.asarray(genome, np.intp)
        steps = [np.repeat(genes, genome[genes]) for genes in structure.sets]
        path = Path.of(genome, [step for step in steps if len(step)])

        def fits(n: int) -> bool:
            return within(limits, context.cost_of(space.decode(path.after(n).tolist())))

        n = _bisect(fits, path.n_steps)
        return path.after(path.n_steps if n is None else n), n is not None

    def _by_estimate(self, context: Context, path: Path, limit: float) -> int | None:
        """How many steps it takes, by the estimate corrected with a few exact sizes."""
        space, size, offset = self._problem.space, self._problem.size, 0.0
        best: int | None = None
        for _ in range(CORRECTIONS):
            n = int(self._steps_to([path], np.array([limit - offset]), 1)[0])
            genome = path.after(n)
            exact = context.size_of(space.decode(genome.tolist()))
            if exact <= limit and (best is None or n < best):
                best = n
            if best is not None and (n == 0 or exact > CLOSE * limit):
                break
            offset = exact - float(size.estimate(genome[None])[0])
        return best

    def _steps_to(self, paths: Sequence[Path], sizes: Floats, tolerance: int) -> Ints:
        """The fewest steps to estimates of (n,) `sizes`, up to `tolerance` - 1 more.

        All of them where that is not reached. Several places of every path are looked at together,
        because an estimate of 64 genomes takes hardly longer than one.
        """
        n, size = len(paths), self._problem.size
        parts = max(2, 1 + SIDE_BY_SIDE // n)
        # low is too few, -1 to begin with; high is enough or all
        low = np.full(n, -1)
        high = np.array([path.n_steps for path in paths], np.intp)
        rows = np.arange(n)
        while (high - low > tolerance).any():
            gaps = (high - low)[:, None] * np.arange(1, parts) // parts
            places = np.column_stack([low, np.maximum(low[:, None] + gaps, 0), high])
            tried = [_after(paths, places[:, column]) for column in range(1, parts)]
            estimates = size.estimate(np.concatenate(tried)).reshape(parts - 1, n)
            # the first place that fits; the last one counts as fitting
            fits = np.column_stack([(estimates <= sizes).T, np.ones(n, np.bool_)])
            first = fits.argmax(axis=1)
            low, high = places[rows, first], places[rows, first + 1]
        return high

    def _path(self, genome: Ints) -> Path:
        """First down to the floors, then to the bottom."""
        low = np.minimum(genome, self._floor)
        bottom = np.minimum(low, self._bottom)
        if self._order == "bits":
            genes = [self._by_excess(genome, low), self._by_excess(low, bottom)]
            return Path.one_by_one(genome, np.concatenate(genes))
        return Path.of(genome, [*self._passes(genome, low), *self._passes(low, bottom)])

    def _by_excess(self, genome: Ints, low: Ints) -> Ints:
        """The gene of each step from one genome down to another, the most excessive first."""
        places = np.arange(self._excess.shape[1])
        genes, positions = np.nonzero((places > low[:, None]) & (places <= genome[:, None]))
        return np.asarray(genes[np.argsort(-self._excess[genes, positions], kind="stable")])

    def _passes(self, genome: Ints, low: Ints) -> list[Ints]:
        room = genome - low
        if self._order == "channels":
            going = self._ascending[(room > 0)[self._ascending] & (low == 0)[self._ascending]]
            return [np.repeat(gene, room[gene]) for gene in going]
        steps: list[Ints] = []
        for taken in range(int(room.max(initial=0))):
            blocks = (block[room[block] > taken] for block in self._layers)
            steps += [block for block in blocks if len(block)]
        return steps


def _excess(problem: Problem) -> Floats:
    """(genes, positions) bits that a width lies above its gene's prior; edges come last."""
    widths = problem.space.gene_widths
    out = np.full((len(widths), max(map(len, widths))), -np.inf)
    for layer in problem.layers:
        genes = slice(layer.start, layer.start + layer.n_genes)
        out[genes, : len(layer.widths)] = layer.widths - layer.prior[:, None]
    for gene in range(len(widths) - len(problem.space.activations), len(widths)):
        out[gene, : len(widths[gene])] = np.array(widths[gene], float) - EDGES_LAST
    return out


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


def _after(paths: Sequence[Path], n_steps: Ints) -> Ints:
    """(n, genes) genomes after (n,) steps of each path."""
    return np.stack([path.after(n) for path, n in zip(paths, n_steps, strict=True)])


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
