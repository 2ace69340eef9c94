"""One agent's run: roll out, screen, evaluate a batch, learn from it, again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.controllers import seeded
from agents.ensemble import Ensemble, Law
from agents.pilot import Ask, Pilot, RollOut
from agents.problem import Problem
from agents.reward import REFERENCES, Baseline
from agents.wall import Wall
from quant_ops.candidate import Candidate
from search.evaluation import Evaluation
from search.strategies.uniform import evaluate_in_batches, uniform_candidates
from search.strategy import Context

OWN_EVERY = 4  # every fourth evaluation is the policy's own answer, not screened, without noise
TRIES = 4  # proposals of a slot that are made exact before it is given up
RETRIES = 8  # wild proposals after that
WILD = 0.8  # their noise
LEAST_NOISE, DECAY = 0.25, 0.97  # of the noise, per batch
NEAR = 1.5  # a trial may be followed at a budget within this factor of its size
USEFUL = 0.5  # of the largest loss known: a network above does nothing any more
ELITES = 6  # of the best trials near a budget one is followed
DEMONSTRATIONS = 300  # earlier trials that enter the replay buffers, the latest
REHEARSAL = 8  # as many times the usual gradient steps before the first batch


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
        noise: standard deviation of exploration, in units of the actions' range of [-1, 1].
        steps: gradient steps per batch of evaluations and controller.
        members: of the surrogate's ensemble.
        policy: folder of trained controllers, or of a run that left them; empty starts anew.
    """

    algorithm: str = "ddpg"
    importance: str = "taylor"
    groups: int = 4
    hidden: int = 64
    proposals: int = 8
    follow: float = 0.5
    noise: float = 0.4
    steps: int = 24
    members: int = 6
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
        if self.steps < 0 or self.noise < 0 or not 0 <= self.follow <= 1:
            raise ValueError("steps and noise must not be negative, follow lies in [0, 1]")


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
    zeros: NDArray[np.bool_] | None = None


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
            for evaluation in self._known[-DEMONSTRATIONS:]:
                self._remember_in_hindsight(evaluation)
            self._fit(generator)
            if self._known:
                self._pilot.learn(REHEARSAL * self._settings.steps)

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
        measured = any(e.strategy == "rate-distortion" for e in self._known)
        return Law.of_table(self._context) if measured else Law.of_importance(self._problem)

    def _plain_goal(self, budget_bytes: float) -> Goal:
        limits = dict(self._context.budgets)
        limits["size_bytes"] = min(budget_bytes, limits.get("size_bytes", budget_bytes))
        return Goal(budget_bytes, limits)

    def _budgets(self, generator: np.random.Generator) -> list[float]:
        """Every second one is a size asked for, the others are spread over the range."""
        n = self._context.batch_size
        low, high = np.log2([self._lowest(), self._problem.limits[1]])
        places = (np.arange(n) + generator.random(n)) / n
        spread = [float(2**x) for x in low + (high - low) * places]
        asked = self._context.sizes
        if asked:
            first = int(generator.integers(len(asked)))
            for slot in range(0, n, 2):
                spread[slot] = float(asked[(first + slot // 2) % len(asked)])
        return spread

    def _lowest(self) -> float:
        """Half the size of the smallest network that still does something, in bytes."""
        smallest, largest = self._problem.limits
        losses = [e.loss for e in self._known if np.isfinite(e.loss)]
        useful = [
            e.size_bytes for e in self._known if e.loss < USEFUL * max(losses, default=np.inf)
        ]
        return min(max(smallest, min(useful, default=smallest) / 2), largest)

    def _proposals(
        self, batch: int, generator: np.random.Generator
    ) -> list[tuple[Candidate, Goal, RollOut]]:
        """One candidate per slot of the batch, legal and new."""
        settings = self._settings
        noise = settings.noise * max(LEAST_NOISE, DECAY**batch)
        goals = [self._goal_of(budget) for budget in self._budgets(generator)]
        asks = [ask for goal in goals for ask in self._asks(goal, noise, generator)]
        rolled = self._pilot.roll_out(self._problem, asks, generator)
        chosen = []
        for slot, goal in enumerate(goals):
            mine = rolled[slot * settings.proposals : (slot + 1) * settings.proposals]
            ordered = self._ordered(mine, goal, slot, batch, generator)
            found = self._first_new(ordered, goal) or self._wild(goal, generator)
            if found is not None:
                chosen.append((found[0], goal, found[1]))
        return chosen

    def _asks(self, goal: Goal, noise: float, generator: np.random.Generator) -> list[Ask]:
        """The policy's own answer first, then noisy ones, some of which follow a good trial."""
        asks = [Ask(goal.budget_bytes, zeros=goal.zeros)]
        elites = self._elites(goal) if goal.zeros is None else []
        for _ in range(self._settings.proposals - 1):
            follow = None
            if elites and generator.random() < self._settings.follow:
                follow = elites[int(generator.integers(len(elites)))]
            asks.append(Ask(goal.budget_bytes, noise, follow, goal.zeros))
        return asks

    def _elites(self, goal: Goal) -> list[tuple[int, ...]]:
        """Genomes of the best trials of about this size, against the reference at theirs."""
        budget = goal.budget_bytes
        near = [e for e in self._known if budget / NEAR <= e.size_bytes <= NEAR * budget]
        near.sort(key=lambda e: -self._baseline.reward(e.loss, e.size_bytes))
        return [self._genome(e) for e in near[:ELITES]]

    def _ordered(
        self,
        rolled: Sequence[RollOut],
        goal: Goal,
        slot: int,
        batch: int,
        generator: np.random.Generator,
    ) -> list[RollOut]:
        """Most promising first; each slot trusts another member of the ensemble."""
        if (slot + batch) % OWN_EVERY == 0:
            return list(rolled)
        if not self._ensemble.is_fitted:
            return [rolled[i] for i in generator.permutation(len(rolled))]
        genomes = np.array([self._wall.estimated(r.genome, goal.budget_bytes) for r in rolled])
        predicted = self._ensemble.log_losses(genomes, slot + batch)
        return [rolled[i] for i in np.argsort(predicted, kind="stable")]

    def _first_new(self, rolled: Sequence[RollOut], goal: Goal) -> tuple[Candidate, RollOut] | None:
        for one in rolled[:TRIES]:
            genome = self._wall.lower(self._context, one.genome, goal.limits)
            candidate = self._context.space.decode(genome)
            if candidate not in self._seen:
                self._seen.add(candidate)
                return candidate, one
        return None

    def _wild(self, goal: Goal, generator: np.random.Generator) -> tuple[Candidate, RollOut] | None:
        asks = [Ask(goal.budget_bytes, WILD, None, goal.zeros)] * RETRIES
        for one in self._pilot.roll_out(self._problem, asks, generator):
            found = self._first_new([one], goal)
            if found is not None:
                return found
        return None

    def _learn(
        self,
        chosen: Sequence[tuple[Candidate, Goal, RollOut]],
        evaluations: Sequence[Evaluation],
        generator: np.random.Generator,
    ) -> None:
        rewards = []
        for (_, goal, rolled), evaluation in zip(chosen, evaluations, strict=True):
            reward = self._baseline.reward(evaluation.loss, goal.budget_bytes)
            self._pilot.remember(
                self._problem,
                self._genome(evaluation),
                goal.budget_bytes,
                reward,
                goals=rolled.goals,
                zeros=goal.zeros,
            )
            self._remember_in_hindsight(evaluation, goal.zeros)
            rewards.append(reward)
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
        self, evaluation: Evaluation, zeros: NDArray[np.bool_] | None = None
    ) -> None:
        """As if the bytes that it takes had been the budget, and the widths it has the goals."""
        self._pilot.remember(
            self._problem,
            self._genome(evaluation),
            evaluation.size_bytes,
            self._baseline.reward(evaluation.loss, evaluation.size_bytes),
            zeros=zeros,
        )


def _usable(evaluation: Evaluation) -> bool:
    return not (evaluation.pruned or evaluation.recipe)
