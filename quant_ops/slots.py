"""Slots: what a channel position of a value can hold, and which positions go together."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Rule: TypeAlias = Callable[[int, int], int]
OPAQUE = 0


class SlotTable:
    """Numbered slots, each with the atoms that make it zero, and a union-find of ties.

    An atom is a slot that stands for one output channel of one layer. A slot is exactly 0 when
    all its atoms are; a slot without atoms is always 0; `None` in place of the atoms: never known
    to be 0. Slot `OPAQUE` is never 0, and what is tied to it is never removed.
    """

    def __init__(self) -> None:
        self.atoms_of: list[frozenset[int] | None] = [None]
        self._parent = [OPAQUE]
        self._sums: dict[frozenset[int], int] = {}
        self._shadows: dict[int, int] = {}

    def new_atoms(self, n: int) -> Ids:
        """The numbers of `n` new atoms."""
        start = len(self._parent)
        return np.array([self._new(frozenset({start + i})) for i in range(n)], np.int64)

    def new_zeros(self, n: int) -> Ids:
        """The numbers of `n` new slots that are always 0."""
        return np.array([self._new(frozenset()) for _ in range(n)], np.int64)

    def pin(self, slots: Ids) -> None:
        """Never remove these slots."""
        for slot in np.unique(slots):
            self._join(OPAQUE, int(slot))

    def pin_nonzero(self, slots: Ids) -> None:
        """Never remove those of the slots that can be other than 0 though their source is 0."""
        for slot in np.unique(slots):
            if self.atoms_of[slot] is None:
                self._join(OPAQUE, int(slot))

    def tie(self, first: Ids, second: Ids) -> None:
        """Slot i of one can only go together with slot i of the other."""
        for a, b in self._pairs(first, second):
            self._join(a, b)

    def tie_all(self, slots: Iterable[int]) -> None:
        """All of these can only go together."""
        head, *rest = slots
        for slot in rest:
            self._join(int(head), int(slot))

    def sum(self, first: Ids, second: Ids) -> Ids:
        """Slots that are 0 where both terms are; terms and sum are tied."""
        return self._combine(first, second, self._sum)

    def product(self, first: Ids, second: Ids) -> Ids:
        """Slots that are 0 where the only factor that can be 0 is 0; all are tied."""
        return self._combine(first, second, self._product)

    def shadow(self, slots: Ids) -> Ids:
        """Slots tied to these that need not be 0 where these are (a sigmoid, a shift)."""
        known = {int(slot): self._shadow(int(slot)) for slot in np.unique(slots)}
        return _look_up(slots, known)

    def merged(self, slots: Ids) -> int:
        """One pinned slot that is 0 where all of these are."""
        self.pin(slots)
        atoms = [self.atoms_of[int(slot)] for slot in np.unique(slots)]
        if any(a is None for a in atoms):
            return OPAQUE
        slot = self._new(frozenset().union(*(a for a in atoms if a is not None)))
        self._join(OPAQUE, slot)
        return slot

    def components(self) -> Ids:
        """For each slot the number of its component; 0 is the pinned one."""
        roots = np.array([self._root(i) for i in range(len(self._parent))])
        unique, numbers = np.unique(roots, return_inverse=True)
        pinned = int(np.searchsorted(unique, self._root(OPAQUE)))
        out: Ids = np.where(numbers == pinned, 0, numbers + (numbers < pinned)).astype(np.int64)
        return out

    def _new(self, atoms: frozenset[int] | None) -> int:
        self.atoms_of.append(atoms)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _root(self, slot: int) -> int:
        parent = self._parent
        while parent[slot] != slot:
            parent[slot] = parent[parent[slot]]
            slot = parent[slot]
        return slot

    def _join(self, a: int, b: int) -> None:
        low, high = sorted((self._root(a), self._root(b)))
        self._parent[high] = low

    def _sum(self, a: int, b: int) -> int:
        self._join(a, b)
        left, right = self.atoms_of[a], self.atoms_of[b]
        if left is None or right is None:
            return a if left is None else b
        return self._union(a, b, left, right)

    def _product(self, a: int, b: int) -> int:
        self._join(a, b)
        left, right = self.atoms_of[a], self.atoms_of[b]
        if left is None or right is None:
            return b if left is None else a
        return self._union(a, b, left, right)

    def _union(self, a: int, b: int, left: frozenset[int], right: frozenset[int]) -> int:
        if left >= right or right >= left:
            return a if left >= right else b
        both = left | right
        if both not in self._sums:
            self._sums[both] = self._new(both)
        self._join(a, self._sums[both])
        return self._sums[both]

    def _shadow(self, slot: int) -> int:
        if self.atoms_of[slot] is None:
            return slot
        if slot not in self._shadows:
            self._shadows[slot] = self._new(None)
            self._join(slot, self._shadows[slot])
        return self._shadows[slot]

    def _pairs(self, first: Ids, second: Ids) -> list[tuple[int, int]]:
        a, b = np.broadcast_arrays(first, second)
        return list(dict.fromkeys(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)))

    def _combine(self, first: Ids, second: Ids, rule: Rule) -> Ids:
        a, b = np.broadcast_arrays(first, second)
        known = {pair: rule(*pair) for pair in self._pairs(a, b)}
        flat = [known[pair] for pair in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)]
        return np.array(flat, np.int64).reshape(a.shape)


def _look_up(slots: Ids, table: Mapping[int, int]) -> Ids:
    flat = [table[slot] for slot in slots.ravel().tolist()]
    return np.array(flat, np.int64).reshape(slots.shape)
