"""Dynamic storage allocation: offsets of pieces of memory whose times of use are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_STATES = 4000  # of the exact search, about 0.1 s


@dataclass(frozen=True)
class Placement:
    """Offsets in bytes, one per piece; the bytes of the whole; whether less is impossible."""

    offsets: tuple[int, ...]
    total: int
    is_optimal: bool


def place(profiles: NDArray[np.int64], bound: int) -> Placement:
    """Offsets such that pieces in use at the same time do not overlap.

    Four greedy orders first; where none of them reaches the bound, a search over all orders with
    ascending offsets, of which one is optimal: push every piece of an optimal layout down in the
    order of its offsets.

    Args:
        profiles: (pieces, steps) bytes of each piece in use at each step, 0 when it is not.
        bound: a total that no layout can beat.
    """
    n = len(profiles)
    sizes = profiles.max(axis=1, initial=0)
    needs = _needs(profiles)
    duration = (profiles > 0).sum(axis=1)
    first = (profiles > 0).argmax(axis=1)
    best: tuple[int, list[int]] | None = None
    for keys in ((-sizes, first), (-sizes * duration, first), (first, -sizes), (-duration, -sizes)):
        offsets = _first_fit(needs, np.lexsort(keys[::-1]).tolist())
        total = max((o + int(s) for o, s in zip(offsets, sizes, strict=True)), default=0)
        if best is None or total < best[0]:
            best = total, offsets
        if best[0] <= bound:
            return Placement(tuple(best[1]), best[0], True)
    assert best is not None
    search = _Search(needs.tolist(), sizes.tolist(), bound, *best)
    search.extend([None] * n, [0] * n, 0)
    return Placement(tuple(search.offsets), search.total, search.is_complete)


def _needs(profiles: NDArray[np.int64]) -> NDArray[np.int64]:
    """[a, b]: bytes above the start of a that b must keep clear of; 0 if they never meet."""
    in_use = profiles > 0
    out = np.zeros((len(profiles), len(profiles)), np.int64)
    for row, profile in enumerate(profiles):
        steps = np.flatnonzero(in_use[row])
        out[row] = (profile[steps] * in_use[:, steps]).max(axis=1, initial=0)
    np.fill_diagonal(out, 0)
    return out


def _first_fit(needs: NDArray[np.int64], order: Sequence[int]) -> list[int]:
    offsets = [0] * len(order)
    placed: list[int] = []
    for piece in order:
        rivals = [p for p in placed if needs[piece, p]]
        above = [
            (offsets[p], offsets[p] + int(needs[p, piece]), int(needs[piece, p])) for p in rivals
        ]
        for start in sorted({0, *(end for _, end, _ in above)}):
            if all(end <= start or start + need <= low for low, end, need in above):
                offsets[piece] = start
                break
        placed.append(piece)
    return offsets


class _Search:
    """Depth first over orders of ascending offsets; gives up after a number of states."""

    def __init__(
        self,
        needs: list[list[int]],
        sizes: list[int],
        bound: int,
        total: int,
        offsets: list[int],
    ) -> None:
        self.needs, self.sizes, self.bound = needs, sizes, bound
        self.total, self.offsets = total, offsets
        self.n_left = _MAX_STATES

    @property
    def is_complete(self) -> bool:
        """Whether all orders were looked at, or ruled out."""
        return self.n_left > 0 or self.total <= self.bound

    def extend(self, placed: list[int | None], lowest: list[int], floor: int) -> None:
        """Try every next piece.

        Args:
            placed: offsets so far, None for the pieces that are left.
            lowest: per piece the smallest offset above the pieces that it meets.
            floor: offset of the piece that was placed last.
        """
        self.n_left -= 1
        left = [p for p, offset in enumerate(placed) if offset is None]
        starts = {p: max(lowest[p], floor) for p in left}
        total = max(
            (o + s for o, s in zip(placed, self.sizes, strict=True) if o is not None), default=0
        )
        if not left and total < self.total:
            self.total, self.offsets = total, [o for o in placed if o is not None]
        if any(starts[p] + self.sizes[p] >= self.total for p in left):
            return
        for piece in sorted(left, key=lambda p: (starts[p], -self.sizes[p])):
            if self.n_left <= 0 or self.total <= self.bound:
                return
            placed[piece] = starts[piece]
            need = self.needs[piece]
            raised = [
                max(low, starts[piece] + n) if n else low
                for low, n in zip(lowest, need, strict=True)
            ]
            self.extend(placed, raised, starts[piece])
            placed[piece] = None
