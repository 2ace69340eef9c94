"""One agent's run: roll out, screen, evaluate a batch, learn from it, again."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.controllers import seeded
from agents.ensemble import Ensemble, Law
from agents.episode import Mask
from agents.layer_facts import Floats
from agents.pilot import Ask, Pilot, RollOut
from agents.problem import Problem
from agents.reward import REFERENCES, Baseline
from agents.wall import Wall
from quant_ops.candidate import Candidate
from search.dominance import non_dominated
from search.evaluation import Evaluation
from search.strategies.uniform import evaluate_in_batches, uniform_candidates
from search.strategy import Context

OWN_EVERY = 4  # every fourth evaluation is the policy's own answer, not screened, without noise
RETRIES = 8  # wild proposals where none of a slot's is new
WILD = 0.4  # their noise
LEAST_NOISE, DECAY = 0.25, 0.97  # of the noise, per batch
NEAR = 1.5  # a trial may be followed at a budget within this factor of its size
ASKED_EVERY = 4  # every fourth evaluation is made at a size asked for
GRID = 65  # points of the front's length
REACH = 1.4  # times smaller than the smallest network that does something is worth a try
USEFUL = 0.5  # of the largest loss known: a network above does nothing any more
HALF_TRUSTED = 800  # evaluations after which the answers of a new policy count half
ELITES = 6  # of the non-dominated trials nearest to a budget one is followed
DEMONSTRATIONS = 300  # earlier trials that enter the replay buffers, the latest
REHEARSAL = 8  # at most as many times the usual gradient steps before the first batch


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Settings of every agent.

    Attributes:
        algorithm: ddpg, td3 or sac.
        importance: weight-sum, weight-norm, norm-scale, taylor or hessian-error.
        groups: rank groups per layer that the channel controller gives widths to.
        hidden: units of each of the two hidden layers of actors and critics.
        proposals: episodes rolled out per evaluation; the surrogate chooses among them.
        follow: share of them that start from the decisions of a good trial of about that size.
        noise: largest standard deviation of exploration, in units of the actions' range of
            [-1, 1]; every episode draws its own, down to 0.
        steps: gradient steps per batch of evaluations and controller.
        members: of the surrogate's ensemble.
        tilt: how far importance sets layers apart before anything is learned, 0 to 1.
        policy: folder of trained controllers, or of a run that left them; empty starts anew.
    """

    algorithm: str = "ddpg"
    importance: str = "taylor"
    groups: int = 4
    hidden: int = 64
    proposals: int = 12
    follow: float = 0.5
    noise: float = 0.3
    steps: int = 8
    members: int = 6
    tilt: float = 1.0
    policy: str = ""

    def __post_init__(self) -> None:
        from agents.controllers import ALGORITHMS
        from agents.importance import CRITERIA

        for name, value, legal in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("importance", self.importance, CRITERIA),
        ):
            if value not in legal:
                raise ValueError(f"{name} must be one of {', '.join(legal)}, got {value!r}")
        for name in ("groups", "hidden", "proposals", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0 or self.noise < 0:
            raise ValueError("steps and noise must not be negative")
        if not (0 <= self.follow <= 1 and 0 <= self.tilt <= 1):
            raise ValueError("follow and tilt lie in [0, 1]")


@dataclass(frozen=True, slots=True, eq=False)
class Goal:
    """What one evaluation is asked to be.

    Attributes:
        budget_bytes: what the controllers see, and where the reward is read.
        limits: cost name to limit, for the wall.
        zeros: (genes,) genes that are gone from the start.
    """

    budget_bytes: float
    limits: Mapping[str, float]
    zeros: Mask | None = None


class Campaign:
    """The loop that all agents share.

    Args:
        context: the engine.
        problem: the constants.
        pilot: the controllers.
        wall: the budget wall.
        settings: see `AgentSettings`.
        goal_of: a budget in bytes to what is asked of an evaluation; by default the run's own
            budgets and no more than those bytes.
    """

    def __init__(
        self,
        context: Context,
        problem: Problem,
        pilot: Pilot,
        wall: Wall,
        settings: AgentSettings,
        *,
        goal_of: Callable[[float], Goal] | None = None,
    ) -> None:
        self._context = context
        self._problem = problem
        self._pilot = pilot
        self._wall = wall
        self._settings = settings
        self._goal_of = goal_of or self._plain_goal
        self._known = [e for e in context.history() if _usable(e)]
        self._seen = {e.candidate for e in context.history()}
        self._uniform = frozenset(uniform_candidates(context.space))
        self._baseline = Baseline(self._known, self._uniform)
        self._genomes: dict[Candidate, tuple[int, ...]] = {}
        self._rewards: list[float] = []
        self._best = -np.inf
        self._ensemble = Ensemble(problem, self._law(), settings.members)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Everything known, in order."""
        return self._known

    def run(self, name: str, most: int | None = None) -> None:
        """Until the share is used up, nothing new is found, or `most` evaluations are made."""
        context = self._context
        self._prepare(name)
        batch = made = 0
        while not context.should_stop() and (most is None or made < most):
            with seeded(context.seed, batch, name) as generator:
                chosen = self._proposals(batch, generator)
            if most is not None:
                chosen = chosen[: most - made]
            if not chosen:
                return
            evaluations = context.evaluate([candidate for candidate, _, _ in chosen])
            with seeded(context.seed, batch, name, "learn") as generator:
                self._learn(chosen, evaluations, generator)
            made += len(chosen)
            batch += 1

    def _prepare(self, name: str) -> None:
        """References to be compared with, then what is known as demonstrations."""
        context = self._context
        known = sum(e.strategy in REFERENCES or e.candidate in self._uniform for e in self._known)
        if known < 2:
            self._evaluate_uniform()
        with seeded(context.seed, 0, name, "rehearse") as generator:
            self._remember_in_hindsight(self._known[-DEMONSTRATIONS:])
            self._fit(generator)
            # a few demonstrations are soon learned by heart
            self._pilot.learn(min(REHEARSAL * self._settings.steps, len(self._known) // 2))

    def _evaluate_uniform(self) -> None:
        context, name = self._context, self._context.strategy
        fresh = [c for c in uniform_candidates(context.space) if c not in self._seen]
        context.strategy = "uniform"
        try:
            evaluate_in_batches(context, fresh)
        finally:
            context.strategy = name
        self._seen |= set(fresh)
        self._known += [e for e in context.history() if e.candidate in set(fresh) and _usable(e)]
        self._baseline = Baseline(self._known, self._uniform)

    def _law(self) -> Law:
        if self._problem.is_measured:
            return Law.of_table(self._context)
        return Law.of_importance(self._problem)

    def _plain_goal(self, budget_bytes: float) -> Goal:
        limits = dict(self._context.budgets)
        limits["size_bytes"] = min(budget_bytes, limits.get("size_bytes", budget_bytes))
        return Goal(budget_bytes, limits)

    def _budgets(self, generator: np.random.Generator) -> list[float]:
        """Every fourth one is a size asked for, the others are spread over the front."""
        n = self._context.batch_size
        spread = self._along_the_front((np.arange(n) + generator.random(n)) / n)
        asked = self._context.sizes
        if asked:
            first = int(generator.integers(len(asked)))
            for number, slot in enumerate(range(0, n, ASKED_EVERY)):
                spread[slot] = float(asked[(first + number) % len(asked)])
        return spread

    def _along_the_front(self, places: Floats) -> list[float]:
        """Places in [0, 1] to bytes: half by log size, half by the loss that the front has there.

        Where a few bytes change the loss most, most is tried.
        """
        low, high = math.log2(self._lowest()), math.log2(self._problem.limits[1])
        octaves = np.linspace(low, high, GRID)
        length = np.linspace(0.0, 1.0, GRID)
        front = non_dominated(self._known)
        if len(front) > 1:
            sizes = np.log2([e.size_bytes for e in front])
            losses = np.interp(octaves, sizes, [e.loss for e in front])
            fallen = losses[0] - np.minimum.accumulate(losses)
            length = length + fallen / max(float(fallen[-1]), 1e-12)
        return [float(x) for x in 2 ** np.interp(places * length[-1], length, octaves)]

    def _lowest(self) -> float:
        """A little less than the smallest network that still does something, in bytes."""
        smallest, largest = self._problem.limits
        useful = min((e.size_bytes for e in self._useful()), default=smallest)
        return min(max(smallest, useful / REACH), largest)

    def _useful(self) -> list[Evaluation]:
        losses = [e.loss for e in self._known if np.isfinite(e.loss)]
        return [e for e in self._known if e.loss < USEFUL * max(losses, default=np.inf)]

    def _proposals(
        self, batch: int, generator: np.random.Generator
    ) -> list[tuple[Candidate, Goal, RollOut]]:
        """One candidate per slot of the batch, legal and new."""
        settings = self._settings
        noise = settings.noise * max(LEAST_NOISE, DECAY**batch)
        goals = [self._goal_of(budget) for budget in self._budgets(generator)]
        asks = [ask for goal in goals for ask in self._asks(goal, noise, generator)]
        rolled = self._rolled(asks, generator)
        chosen = []
        for slot, goal in enumerate(goals):
            mine = slice(slot * settings.proposals, (slot + 1) * settings.proposals)
            ordered = self._ordered(rolled[mine], goal.budget_bytes, slot, batch, generator)
            found = self._first_new(ordered, goal) or self._wild(goal, generator)
            if found is not None:
                chosen.append((found[0], goal, found[1]))
        return chosen

    def _rolled(self, asks: Sequence[Ask], generator: np.random.Generator) -> list[RollOut]:
        """Episodes whose genomes take about the bytes that they may."""
        rolled = self._pilot.roll_out(self._problem, asks, generator)
        budgets = np.array([ask.budget_bytes for ask in asks])
        filled = self._wall.filled(np.array([r.genome for r in rolled]), budgets)
        return [replace(r, genome=g) for r, g in zip(rolled, filled, strict=True)]

    def _asks(self, goal: Goal, noise: float, generator: np.random.Generator) -> list[Ask]:
        """The policy's own answer first, then noisy ones, some of which follow a good trial."""
        made = len(self._rewards)
        trust = 1.0 if self._settings.policy else made / (made + HALF_TRUSTED)
        asks = [Ask(goal.budget_bytes, zeros=goal.zeros, trust=trust)]
        elites = self._elites(goal) if goal.zeros is None else []
        for _ in range(self._settings.proposals - 1):
            follow = None
            if elites and generator.random() < self._settings.follow:
                follow = elites[int(generator.integers(len(elites)))]
            mine = noise * float(generator.random()) ** 2
            asks.append(Ask(goal.budget_bytes, mine, follow, goal.zeros, trust))
        return asks

    def _elites(self, goal: Goal) -> list[tuple[int, ...]]:
        """Genomes of the non-dominated trials nearest to this size that still do something."""
        near = [
            (far, e)
            for e in non_dominated(self._useful())
            if (far := abs(math.log(e.size_bytes / goal.budget_bytes))) <= math.log(NEAR)
        ]
        near.sort(key=lambda pair: pair[0])
        return [self._genome(e) for _, e in near[:ELITES]]

    def _ordered(
        self,
        rolled: Sequence[RollOut],
        budget_bytes: float,
        slot: int,
        batch: int,
        generator: np.random.Generator,
    ) -> list[RollOut]:
        """Most promising first, by the genomes behind the wall; each slot trusts another member.

        All of the first batch is what the policy says before it has learned: the reference that
        later rewards are compared with.
        """
        if batch == 0 or (slot + batch) % OWN_EVERY == 0:
            return list(rolled)
        if not self._ensemble.is_fitted:
            return [rolled[i] for i in generator.permutation(len(rolled))]
        genomes = np.array([r.genome for r in rolled])
        predicted = self._ensemble.log_losses(genomes, slot + batch, budget_bytes)
        return [rolled[i] for i in np.argsort(predicted, kind="stable")]

    def _first_new(self, rolled: Sequence[RollOut], goal: Goal) -> tuple[Candidate, RollOut] | None:
        for one in rolled:
            genome = self._wall.lower(self._context, one.genome, goal.limits)
            candidate = self._context.space.decode(genome)
            if candidate not in self._seen:
                self._seen.add(candidate)
                self._genomes[candidate] = genome
                return candidate, one
        return None

    def _wild(self, goal: Goal, generator: np.random.Generator) -> tuple[Candidate, RollOut] | None:
        asks = [Ask(goal.budget_bytes, WILD, None, goal.zeros)] * RETRIES
        return self._first_new(self._rolled(asks, generator), goal)

    def _learn(
        self,
        chosen: Sequence[tuple[Candidate, Goal, RollOut]],
        evaluations: Sequence[Evaluation],
        generator: np.random.Generator,
    ) -> None:
        if not self._rewards:
            first = {candidate for candidate, _, _ in chosen}
            self._baseline = Baseline([*self._known, *evaluations], self._uniform | first)
        budgets = [goal.budget_bytes for _, goal, _ in chosen]
        zeros = [goal.zeros for _, goal, _ in chosen]
        rewards = [
            self._baseline.reward(evaluation.loss, budget)
            for evaluation, budget in zip(evaluations, budgets, strict=True)
        ]
        self._pilot.remember(
            self._problem,
            [self._genome(e) for e in evaluations],
            budgets,
            rewards,
            goals=np.array([rolled.goals for _, _, rolled in chosen]),
            zeros=zeros,
        )
        self._remember_in_hindsight(evaluations, zeros)
        self._known += [e for e in evaluations if _usable(e)]
        self._fit(generator)
        self._pilot.learn(self._settings.steps)
        self._rewards += rewards
        self._best = max(self._best, *rewards)
        self._context.report(
            f"episode {len(self._rewards)}  reward {np.mean(rewards):+.2f}  best {self._best:+.2f}"
        )

    def _fit(self, generator: np.random.Generator) -> None:
        used = [e for e in self._known if np.isfinite(e.loss)]
        if used:
            self._ensemble.fit(
                np.array([self._genome(e) for e in used], np.intp),
                np.array([e.loss for e in used]),
                np.array([e.size_bytes for e in used], float),
                generator,
            )

    def _genome(self, evaluation: Evaluation) -> tuple[int, ...]:
        candidate = evaluation.candidate
        if candidate not in self._genomes:
            self._genomes[candidate] = self._context.space.encode(candidate)
        return self._genomes[candidate]

    def _remember_in_hindsight(
        self, evaluations: Sequence[Evaluation], zeros: Sequence[Mask | None] = ()
    ) -> None:
        """As if the bytes that they take had been the budgets, and their widths the goals."""
        if evaluations:
            self._pilot.remember(
                self._problem,
                [self._genome(e) for e in evaluations],
                [e.size_bytes for e in evaluations],
                [self._baseline.reward(e.loss, e.size_bytes) for e in evaluations],
                zeros=zeros,
            )


def _usable(evaluation: Evaluation) -> bool:
    return not (evaluation.pruned or evaluation.recipe)
