"""Widths moved step by step until a file uses up its budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant_ops.candidate import Candidate
from quant_ops.errors import BudgetError
from quant_ops.graph import Graph
from quant_ops.learned_widths.size import with_widths
from quant_ops.storage import BIAS_BYTES, kept_weights, plan_storage

_ASIDE_BYTES = 8  # that a step can save beside its codes: the base of a width that goes, rounding

SizeOf: TypeAlias = Callable[[Candidate], int]


@dataclass(frozen=True, slots=True)
class _Step:
    """One group of channels from position `at` of its legal widths to the next wider."""

    layer: str
    group: int
    at: int
    gain: float  # loss that is saved
    n_bytes: float  # codes alone, before rounding to whole bytes


def fill(
    graph: Graph,
    candidate: Candidate,
    *,
    legal: Mapping[str, Sequence[float]],
    scores: Mapping[str, NDArray[np.float64]],
    budget_bytes: int,
    size_of: SizeOf,
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
    remove: bool = False,
) -> Candidate:
    """The candidate widened (or narrowed, where it is too large) to use up the budget.

    A channel of score s is taken to lose s 4^-b; steps are made in order of loss per byte, as by
    handing out bits one at a time [Fox1966], first as many as fit together, then one by one
    whatever still fits. The result is never above the budget, and no single step fits any more.
    Channels of width 0 stay removed.

    Args:
        graph: the folded network.
        candidate: where to start; layers without legal widths keep theirs.
        legal: layer name to the widths that its channels may have.
        scores: layer name to one number per channel (out,), not negative.
        budget_bytes: inclusive.
        size_of: exact size of a candidate.
        groups: layer name to channels that share a width; each channel alone where missing.
        remove: whether narrowing may go to 0, where it is legal; one group of a layer stays.

    Raises:
        BudgetError: not even the narrowest widths fit.
    """
    filling = _Filling(graph, candidate, legal, scores, groups or {})
    if size_of(candidate) > budget_bytes:
        filling.narrow(budget_bytes, size_of, remove)
    filling.widen(budget_bytes, size_of)
    return filling.candidate()


class _Filling:
    def __init__(
        self,
        graph: Graph,
        candidate: Candidate,
        legal: Mapping[str, Sequence[float]],
        scores: Mapping[str, NDArray[np.float64]],
        groups: Mapping[str, Sequence[Sequence[int]]],
    ) -> None:
        self.start = candidate
        self.legal = {name: tuple(sorted(widths)) for name, widths in legal.items()}
        self.groups: dict[str, Sequence[Sequence[int]]] = {}
        self.at: dict[tuple[str, int], int] = {}
        self.steps: dict[tuple[str, int], list[_Step]] = {}
        columns = plan_storage(graph, candidate).columns
        for name, quant in candidate.layers:
            if name not in self.legal:
                continue
            layer = graph.layer_of[name]
            widths = quant.per_channel(layer.out_channels)
            self.groups[name] = groups.get(name) or [(c,) for c in range(layer.out_channels)]
            for number, channels in enumerate(self.groups[name]):
                here = {widths[c] for c in channels}
                if len(here) > 1 or not here <= set(self.legal[name]):
                    raise ValueError(
                        f"channels {tuple(channels)} of {name} have widths {sorted(here)}; wanted "
                        f"one of {self.legal[name]}"
                    )
                self.at[name, number] = self.legal[name].index(here.pop())
                score = float(sum(scores[name][c] for c in channels))
                bias = BIAS_BYTES if layer.bias else 0
                n_weights = kept_weights(layer, columns.get(name))
                sizes = (n_weights * len(channels), (1 + bias) * len(channels))
                self.steps[name, number] = self._steps(name, number, score, sizes)

    def _steps(self, name: str, number: int, score: float, sizes: tuple[int, int]) -> list[_Step]:
        legal = self.legal[name]
        n_weights, n_aside = sizes
        out = []
        for at, (narrow, wide) in enumerate(pairwise(legal)):
            gain = score * (4.0**-narrow - 4.0**-wide)
            n_bytes = n_weights * (wide - narrow) / 8 + (0 if narrow else n_aside)
            out.append(_Step(name, number, at, gain, n_bytes))
        return out

    def narrow(self, budget_bytes: int, size_of: SizeOf, remove: bool) -> None:
        """Undo the steps that matter least, as few as are needed."""
        below = [
            step
            for key, steps in self.steps.items()
            for step in steps[: self.at[key]]
            if remove or self.legal[step.layer][step.at] > 0
        ]
        below.sort(key=lambda step: (step.gain / step.n_bytes, -step.at))
        ends = {step.layer: step for step in below if self.legal[step.layer][step.at] == 0}
        # undoing all of these would leave a layer nothing but removed channels
        below = [step for step in below if ends.get(step.layer) is not step]
        before = dict(self.at)

        def undone(n: int) -> Candidate:
            self.at = dict(before)
            for step in below[:n]:
                self.at[step.layer, step.group] = min(self.at[step.layer, step.group], step.at)
            return self.candidate()

        least = size_of(undone(len(below)))
        if least > budget_bytes:
            raise BudgetError(
                f"no widths fit {budget_bytes:,} bytes: the narrowest legal ones need {least:,}; "
                f"raise --budget or allow narrower layers"
            )
        low, high = 0, len(below)  # what `high` undoes fits, what `low` undoes does not
        while high - low > 1:
            middle = (low + high) // 2
            if size_of(undone(middle)) <= budget_bytes:
                high = middle
            else:
                low = middle
        undone(high)

    def widen(self, budget_bytes: int, size_of: SizeOf) -> None:
        """Take the steps that matter most, then every other that still fits."""
        above = [
            step
            for key, steps in self.steps.items()
            for step in steps[self.at[key] :]
            if self.legal[step.layer][self.at[key]] > 0
        ]
        above.sort(key=lambda step: (-step.gain / step.n_bytes, step.at))
        before = dict(self.at)

        def taken(n: int) -> Candidate:
            self.at = dict(before)
            for step in above[:n]:
                self.at[step.layer, step.group] = max(self.at[step.layer, step.group], step.at + 1)
            return self.candidate()

        low, high = 0, len(above) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if size_of(taken(middle)) <= budget_bytes:
                low = middle
            else:
                high = middle
        size = size_of(taken(low))
        left, n_before = above[low:], -1
        while len(left) != n_before:  # what a width map costs can fall, and let another step in
            n_before = len(left)
            left, size = self._fit(left, size, budget_bytes, size_of)

    def _fit(
        self, steps: Sequence[_Step], size: int, budget_bytes: int, size_of: SizeOf
    ) -> tuple[list[_Step], int]:
        """Take the steps that fit one by one; those that are left, and the size."""
        left = []
        for step in steps:
            key = step.layer, step.group
            if self.at[key] != step.at or step.n_bytes > budget_bytes - size + _ASIDE_BYTES:
                left.append(step)
                continue
            self.at[key] += 1
            tried = size_of(self.candidate())
            if tried <= budget_bytes:
                size = tried
            else:
                self.at[key] -= 1
                left.append(step)
        return left, size

    def candidate(self) -> Candidate:
        """The widths as they are now."""
        widths: dict[str, tuple[float, ...]] = {}
        for name, groups in self.groups.items():
            per_channel = [0.0] * sum(len(channels) for channels in groups)
            for number, channels in enumerate(groups):
                for channel in channels:
                    per_channel[channel] = self.legal[name][self.at[name, number]]
            widths[name] = tuple(per_channel)
        return with_widths(self.start, widths)
