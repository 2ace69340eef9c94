"""In which order operations run, so that little memory is alive at the same time.

The largest sum of what is alive is found by a best-first search over sets of finished operations
[Ahn2020]: a set is reached at the least peak of any order, and what runs next depends on the set
alone. Operations that take no memory run as soon as they can.
"""

import heapq
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_MAX_STATES = 3000  # of the search, about 0.1 s; larger networks get the best order found by then


@dataclass(frozen=True, slots=True)
class Operation:
    """One step that may be moved.

    Attributes:
        after: numbers of operations that come before it.
        uses: pieces of memory that it reads or writes; each is alive from the first to the last
            operation that uses it.
        scratch: bytes that it needs only while it runs.
        overwrites: pieces of which it may take the place, if it uses them last.
    """

    after: frozenset[int]
    uses: tuple[int, ...]
    scratch: int = 0
    overwrites: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """Numbers of operations as they run, the largest sum of what is alive, whether none is less."""

    order: tuple[int, ...]
    live_bytes: int
    is_optimal: bool


class _State(NamedTuple):
    """Operations that are finished, in the order in which the search looks at them."""

    peak: int
    n_left: int  # a constant less
    done: int  # one bit each
    at: int  # bytes alive while the last of them ran
    alive: int
    can: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Operations on pieces of memory.

    Attributes:
        operations: in an order in which they can run.
        n_bytes: of every piece.
        ready: pieces that are alive from the start; nothing takes their place.
        kept: pieces that are alive to the end; nothing takes their place.
    """

    operations: tuple[Operation, ...]
    n_bytes: tuple[int, ...]
    ready: Set[int]
    kept: Set[int]

    def least_live(self) -> Order:
        """An order with the smallest peak that was found; never worse than the given one."""
        given = tuple(range(len(self.operations)))
        peak = self.live_bytes(given)
        if peak <= self._floor:
            return Order(given, peak, True)
        found = self._search()
        return found if found.live_bytes < peak else Order(given, peak, found.is_optimal)

    def live_bytes(self, order: Sequence[int]) -> int:
        """Largest sum of what is alive in an order."""
        done, alive, peak = 0, self._start, self._floor
        for operation in order:
            at, alive = self._run(done, alive, operation)
            peak, done = max(peak, at), done | 1 << operation
        return peak

    def orders(self, below: int) -> Iterator[tuple[int, ...]]:
        """Every order whose peak is less than a number of bytes; there may be very many."""
        stack = [self._first()]
        while stack:
            state = stack.pop()
            if len(state.order) == len(self.operations):
                yield state.order
            stack += [s for s in self._after(state) if s.peak < below]

    def _search(self) -> Order:
        """Least peak first, and of equal ones what is nearest to the end."""
        queue = [self._first()]
        seen: set[int] = set()
        while queue:
            state = heapq.heappop(queue)
            if state.done in seen:
                continue
            seen.add(state.done)
            if len(state.order) == len(self.operations):
                return Order(state.order, state.peak, True)
            if len(seen) > _MAX_STATES:
                return self._greedy(state)
            for following in self._without_regret(state, self._after(state)):
                if following.done not in seen:
                    heapq.heappush(queue, following)
        raise ValueError("operations that wait for each other have no order")

    def _without_regret(self, state: "_State", following: list["_State"]) -> list["_State"]:
        """One alone where it neither raises the peak nor leaves more: to wait gains nothing."""
        safe = (s for s in following if s.peak == state.peak and s.alive <= state.alive)
        found = next(safe, None)
        return following if found is None else [found]

    def _greedy(self, state: "_State") -> Order:
        """The rest of an order: each time what needs least while it runs, then leaves least."""
        while len(state.order) < len(self.operations):
            state = min(self._after(state), key=lambda s: (s.at, s.alive))
        return Order(state.order, state.peak, False)

    def _first(self) -> "_State":
        can = tuple(at for at, own in enumerate(self.operations) if not own.after)
        return _State(self._floor, 0, 0, self._start, self._start, can, ())

    def _after(self, state: "_State") -> list["_State"]:
        """What can follow; of operations that take no memory only the first."""
        can = state.can
        free = next((at for at in can if self._is_free(state.done, at)), None)
        return [self._ran(state, at) for at in (can if free is None else (free,))]

    def _ran(self, state: "_State", operation: int) -> "_State":
        at, alive = self._run(state.done, state.alive, operation)
        done = state.done | 1 << operation
        freed = [o for o in self._following[operation] if self._before[o] & done == self._before[o]]
        can = tuple(sorted({*state.can, *freed} - {operation}))
        order = (*state.order, operation)
        return _State(max(state.peak, at), -len(order), done, at, alive, can, order)

    def _is_free(self, done: int, operation: int) -> bool:
        own = self.operations[operation]
        return not own.scratch and not any(self._is_born(done, piece) for piece in own.uses)

    def _is_born(self, done: int, piece: int) -> bool:
        return piece not in self.ready and not self._users[piece] & done

    def _run(self, done: int, alive: int, operation: int) -> tuple[int, int]:
        """Bytes alive while an operation runs, and afterwards."""
        own = self.operations[operation]
        after = done | 1 << operation
        dying = [
            piece
            for piece in own.uses
            if piece not in self.kept and self._users[piece] & after == self._users[piece]
        ]
        at, left = alive + own.scratch, alive
        for piece in own.uses:
            if self._is_born(done, piece):
                size = self.n_bytes[piece]
                left += size
                if not any(self._fits(piece, old, own, dying) for old in own.overwrites):
                    at += size
        return at, left - sum(self.n_bytes[piece] for piece in dying)

    def _fits(self, piece: int, old: int, own: Operation, dying: Sequence[int]) -> bool:
        is_free = old in dying and old not in self.ready and old in own.uses
        return is_free and self.n_bytes[old] >= self.n_bytes[piece]

    @cached_property
    def _users(self) -> list[int]:
        """Per piece the operations that use it, one bit each."""
        users = [0] * len(self.n_bytes)
        for at, operation in enumerate(self.operations):
            for piece in operation.uses:
                users[piece] |= 1 << at
        return users

    @cached_property
    def _before(self) -> list[int]:
        """Per operation those that come before it, one bit each."""
        return [sum(1 << other for other in operation.after) for operation in self.operations]

    @cached_property
    def _following(self) -> list[list[int]]:
        """Per operation those that wait for it."""
        following: list[list[int]] = [[] for _ in self.operations]
        for at, operation in enumerate(self.operations):
            for other in operation.after:
                following[other].append(at)
        return following

    @cached_property
    def _start(self) -> int:
        return sum(self.n_bytes[piece] for piece in self.ready)

    @cached_property
    def _floor(self) -> int:
        """What no order can beat: the start, the end, and each operation by itself."""
        end = sum(self.n_bytes[piece] for piece in self.kept)
        alone = [
            sum(self.n_bytes[piece] for piece in set(own.uses))
            - (max((self.n_bytes[piece] for piece in own.uses), default=0) if own.overwrites else 0)
            + own.scratch
            for own in self.operations
        ]
        return max([self._start, end, *alone])
