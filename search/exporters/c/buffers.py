"""Buffers of a generated library, and the operations on them as they arise."""

from collections.abc import Sequence

import numpy as np

from quant_ops.requantize import Codes
from search.exporters.c.moves import HOLE, Map, is_identity, loops
from search.exporters.c.network import Copy, Operation, Value, reads


class Buffers:
    """Where values lie; a copy of a copy reads the first one.

    Args:
        spatial_ranks: axes of values (without the batch) that lie channels last.

    Attributes:
        sizes: bytes of every buffer.
        operations: in the order in which they run.
    """

    def __init__(self, spatial_ranks: frozenset[int]) -> None:
        self.spatial_ranks = spatial_ranks
        self.sizes: list[int] = []
        self.operations: list[Operation] = []
        self.origins: dict[int, tuple[Value, Map]] = {}  # buffer of a copy: what it was copied from

    def order(self, rank: int) -> tuple[int, ...]:
        """How a new value of `rank` axes (without the batch) lies."""
        if rank in self.spatial_ranks:
            return (*range(1, rank), 0)
        return tuple(range(rank))

    def new(self, sizes: Sequence[int], order: tuple[int, ...], codes: Codes) -> Value:
        """A value in a buffer of its own."""
        value = Value(len(self.sizes), tuple(sizes), order, codes)
        self.sizes.append(value.n_bytes)
        return value

    def lying(self, value: Value, order: tuple[int, ...]) -> Value:
        """The value with its axes in `order`, copied if it lies otherwise."""
        if value.order == order:
            return value
        numbers = np.arange(value.n).reshape(value.lies)
        logical = numbers.transpose(np.argsort(value.order))
        return self.moved("layout", value, logical.transpose(order), value.sizes, order)

    def moved(
        self, name: str, source: Value, positions: Map, sizes: Sequence[int], order: Sequence[int]
    ) -> Value:
        """A value whose elements, as they lie, are those of `source` at `positions`."""
        flat = np.ascontiguousarray(positions).reshape(-1)
        if is_identity(flat, source.n):
            return Value(source.buffer, tuple(sizes), tuple(order), source.codes)
        if source.buffer in self.origins:  # one copy instead of two in a row
            source, before = self.origins[source.buffer]
            flat = np.where(flat == HOLE, HOLE, before[flat])
        target = self.new(sizes, tuple(order), source.codes)
        self.origins[target.buffer] = source, flat
        self.operations.append(Copy(name, source, target, *loops(flat)))
        return target

    def needed(self, outputs: Sequence[Value]) -> tuple[Operation, ...]:
        """The operations without copies that nothing reads."""
        read = {value.buffer for value in outputs}
        kept: list[Operation] = []
        for operation in reversed(self.operations):
            if isinstance(operation, Copy) and operation.target.buffer not in read:
                continue
            kept.append(operation)
            read |= {value.buffer for value in reads(operation)}
        return tuple(reversed(kept))
