"""Both controllers at work: several episodes side by side, and what they remember of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.controllers import Controller
from agents.episode import (
    CHANNEL_FIELDS,
    LAYER_FIELDS,
    Episodes,
    LayerDecisions,
    Mask,
    Rows,
    shares_and_widths,
)
from agents.layer_facts import Floats, Ints
from agents.problem import Problem
from agents.retrace import Trace, retrace

FOLLOWED_CHANGES = 0.15  # share of the layers at which an episode leaves the trial it follows


@dataclass(frozen=True, slots=True)
class Scope:
    """What is decided: pruning, widths, and whether each rank group gets a width of its own."""

    prune: bool = True
    widths: bool = True
    by_channel: bool = True

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the layer controller's actions."""
        return ("sparsity",) * self.prune + ("width",) * self.widths


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One episode to roll out.

    Attributes:
        budget_bytes: its budget.
        noise: standard deviation of what is added to every action.
        follow: a finished genome whose decisions are taken, but for some, instead of the policy's.
        zeros: (genes,) genes that are gone from the start.
        trust: factor of the policy's answers; 0 leaves all to importance.
    """

    budget_bytes: float
    noise: float = 0.0
    follow: tuple[int, ...] | None = None
    zeros: Mask | None = None
    trust: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class RollOut:
    """A finished episode, before the wall: genome, and the goal of every layer step."""

    genome: Ints
    goals: Floats


class Pilot:
    """A layer controller and, where rank groups get widths of their own, a channel controller."""

    def __init__(self, scope: Scope, algorithm: str, hidden: int) -> None:
        self.scope = scope
        self.layers = Controller(algorithm, len(LAYER_FIELDS), len(scope.actions), hidden)
        self.channels: Controller | None = None
        if scope.by_channel:
            self.channels = Controller(algorithm, len(CHANNEL_FIELDS), 1, hidden)

    def roll_out(
        self, problem: Problem, asks: Sequence[Ask], generator: np.random.Generator
    ) -> list[RollOut]:
        """All episodes, layer by layer side by side."""
        episodes = Episodes(problem, [a.budget_bytes for a in asks], [a.zeros for a in asks])
        party = _Party.of(problem, asks, generator)
        n_edges = len(problem.space.activations)
        if n_edges:
            followers = party.is_following
            episodes.genomes[followers, -n_edges:] = party.followed[followers, -n_edges:]
        goals = []
        while not episodes.done:
            goals.append(self._decide_layer(episodes, party))
        columns = np.array(goals).reshape(len(goals), len(asks)).T
        return [RollOut(g, row) for g, row in zip(episodes.genomes, columns, strict=True)]

    def remember(
        self,
        problem: Problem,
        genomes: Sequence[Sequence[int]],
        budgets: Sequence[float],
        rewards: Sequence[float],
        *,
        goals: Floats | None = None,
        zeros: Sequence[Mask | None] = (),
    ) -> Trace:
        """Fill the replay buffers with the executed decisions of episodes; see `retrace`."""
        trace = retrace(
            problem,
            np.array(genomes, np.intp),
            budgets,
            goals=goals,
            zeros=zeros,
            thresholds=self.scope.widths,
        )
        columns = [i for i, on in enumerate((self.scope.prune, self.scope.widths)) if on]
        returns = np.array(rewards, float)
        layers = replace(trace.layers, actions=trace.layers.actions[:, columns])
        self.layers.remember(layers, returns)
        if self.channels is not None:
            self.channels.remember(trace.channels, returns)
        return trace

    def learn(self, steps: int) -> None:
        """Gradient steps of both."""
        self.layers.learn(steps)
        if self.channels is not None:
            self.channels.learn(steps)

    def _decide_layer(self, episodes: Episodes, party: "_Party") -> Floats:
        """One layer of every episode; the (n,) goals."""
        layer = episodes.layer
        followed = party.followed[:, layer.start : layer.start + layer.n_genes]
        leaves = party.generator.random(episodes.n) <= FOLLOWED_CHANGES
        copies = party.is_following & ~leaves
        _, means = shares_and_widths(layer, followed)
        actions = self._layer_actions(episodes, party, followed, means)
        by_name = dict(zip(self.scope.actions, party.moved(actions).T, strict=True))
        decisions = episodes.decisions_of(by_name.get("sparsity"), by_name.get("width"))
        episodes.begin_layer(decisions)
        if self.channels is None:
            episodes.place_evenly()
        else:
            self._decide_channels(episodes, party, followed, self.channels)
        episodes.settle(followed[copies], copies)
        return np.where(copies, means, decisions.goals)

    def _layer_actions(
        self, episodes: Episodes, party: "_Party", followed: Ints, means: Floats
    ) -> Rows:
        """(n, actions) of the policy, or of what is followed."""
        actions = self.layers.act(episodes.layer_observations()) * party.trust[:, None]
        if party.is_following.any():
            layer = episodes.layer
            n_pruned = layer.is_zero[followed].sum(axis=1)
            wanted = LayerDecisions(n_pruned, np.where(means > 0, means, episodes.even_bits))
            both = episodes.actions_of(wanted, thresholds=self.scope.widths)
            columns = [("sparsity", "width").index(name) for name in self.scope.actions]
            actions[party.is_following] = both[party.is_following][:, columns]
        return actions

    def _decide_channels(
        self, episodes: Episodes, party: "_Party", followed: Ints, controller: Controller
    ) -> None:
        while episodes.open.any():
            actions = controller.act(episodes.channel_observations())[:, 0] * party.trust
            widths = episodes.followed_widths(followed)
            known = party.is_following & (widths > 0)
            actions = np.where(known, episodes.channel_actions_of(widths), actions)
            moved = party.moved(actions[:, None])[:, 0]
            episodes.place(episodes.positions_of(moved))


@dataclass(frozen=True, eq=False)
class _Party:
    """What the episodes of one roll-out were asked for, as arrays."""

    noise: Floats
    trust: Rows
    followed: Ints
    is_following: Mask
    generator: np.random.Generator

    @classmethod
    def of(cls, problem: Problem, asks: Sequence[Ask], generator: np.random.Generator) -> "_Party":
        followed = [problem.widest if a.follow is None else a.follow for a in asks]
        return cls(
            np.array([a.noise for a in asks], float),
            np.array([a.trust for a in asks], np.float32),
            np.array(followed, np.intp),
            np.array([a.follow is not None for a in asks], np.bool_),
            generator,
        )

    def moved(self, actions: Floats | Rows) -> Floats:
        """(n, numbers) actions with each episode's noise."""
        normal = self.generator.standard_normal(actions.shape)
        return np.asarray(np.clip(actions + self.noise[:, None] * normal, -1.0, 1.0))
