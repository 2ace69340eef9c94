"""Both controllers at work: several episodes side by side, and what they remember of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.controllers import Controller, Rows
from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS, Episode, LayerDecision, share_and_width
from agents.problem import Ints, Problem
from agents.retrace import Trace, retrace

FOLLOWED_CHANGES = 0.3  # share of the layers at which an episode leaves the trial it follows


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
    """

    budget_bytes: float
    noise: float = 0.0
    follow: tuple[int, ...] | None = None
    zeros: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RollOut:
    """A finished episode, before the wall: genome, and the goal of every layer step."""

    genome: Ints
    goals: tuple[float, ...]


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
        episodes = [Episode(problem, ask.budget_bytes, ask.zeros) for ask in asks]
        goals: list[list[float]] = [[] for _ in asks]
        n_edges = len(problem.space.activations)
        for episode, ask in zip(episodes, asks, strict=True):
            if ask.follow is not None and n_edges:
                episode.genome[-n_edges:] = ask.follow[-n_edges:]
        for _ in problem.steps:
            self._decide_layer(episodes, asks, goals, generator)
        return [
            RollOut(episode.genome, tuple(g)) for episode, g in zip(episodes, goals, strict=True)
        ]

    def remember(
        self,
        problem: Problem,
        genome: Sequence[int],
        budget_bytes: float,
        reward: float,
        *,
        goals: Sequence[float] | None = None,
        zeros: NDArray[np.bool_] | None = None,
    ) -> Trace:
        """Fill the replay buffers with one episode's executed decisions."""
        trace = retrace(problem, genome, budget_bytes, goals=goals, zeros=zeros)
        columns = [i for i, on in enumerate((self.scope.prune, self.scope.widths)) if on]
        self.layers.remember([t.only(columns) for t in trace.layers], reward)
        if self.channels is not None:
            self.channels.remember(trace.channels, reward)
        return trace

    def learn(self, steps: int) -> None:
        """Gradient steps of both."""
        self.layers.learn(steps)
        if self.channels is not None:
            self.channels.learn(steps)

    def _decide_layer(
        self,
        episodes: Sequence[Episode],
        asks: Sequence[Ask],
        goals: list[list[float]],
        generator: np.random.Generator,
    ) -> None:
        observations = np.stack([e.layer_observation() for e in episodes])
        actions = self.layers.act(observations)
        open_layers: list[tuple[int, Ints | None]] = []
        for number, (episode, ask) in enumerate(zip(episodes, asks, strict=True)):
            layer = episode.layer
            followed = None
            action = actions[number]
            if ask.follow is not None:
                followed = np.array(ask.follow[layer.start : layer.start + layer.n_genes], np.intp)
                if generator.random() > FOLLOWED_CHANGES:
                    goals[number].append(share_and_width(layer, followed)[1])
                    episode.overwrite(followed)
                    continue
                action = self._followed_action(episode, followed)
            decision = self._decision(episode, _noisy(action, ask.noise, generator))
            goals[number].append(decision.goal)
            at = episode.at
            episode.begin_layer(decision)
            if episode.at == at:
                open_layers.append((number, followed))
        if self.channels is None:
            for number, _ in open_layers:
                episodes[number].place_all(episodes[number].width_of(0.0))
            return
        self._decide_channels(episodes, asks, open_layers, generator)

    def _decide_channels(
        self,
        episodes: Sequence[Episode],
        asks: Sequence[Ask],
        waiting: list[tuple[int, Ints | None]],
        generator: np.random.Generator,
    ) -> None:
        assert self.channels is not None
        while waiting:
            rows: Rows = np.stack([episodes[n].channel_observation() for n, _ in waiting])
            actions = self.channels.act(rows)
            left = []
            for (number, followed), action in zip(waiting, actions, strict=True):
                episode = episodes[number]
                if followed is not None:
                    width = episode.followed_width(followed)
                    if width:
                        action = np.array([episode.channel_action_of(width)], np.float32)
                moved = _noisy(action, asks[number].noise, generator)
                if not episode.place(episode.width_of(float(moved[0]))):
                    left.append((number, followed))
            waiting = left

    def _decision(self, episode: Episode, action: Rows) -> LayerDecision:
        values = dict(zip(self.scope.actions, (float(a) for a in action), strict=True))
        return episode.decision_of(values.get("sparsity"), values.get("width"))

    def _followed_action(self, episode: Episode, positions: Ints) -> Rows:
        layer = episode.layer
        _, mean = share_and_width(layer, positions)
        n_pruned = int(layer.is_zero[positions].sum())
        pair = episode.action_of(LayerDecision(n_pruned, mean or episode.even_bits))
        both = dict(zip(("sparsity", "width"), pair, strict=True))
        return np.array([both[name] for name in self.scope.actions], np.float32)


def _noisy(action: Rows, noise: float, generator: np.random.Generator) -> Rows:
    if not noise:
        return action
    return np.clip(action + noise * generator.standard_normal(len(action)), -1.0, 1.0).astype(
        np.float32
    )
