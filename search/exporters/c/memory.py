"""In which order operations run, and where every buffer lies in the static arena."""

from dataclasses import dataclass, replace

import numpy as np

from cost_models.order import Operation, Problem
from cost_models.placement import place
from search.exporters.c.network import Network, reads
from search.exporters.c.network import Operation as NetworkOperation

ALIGNMENT = 4  # of every buffer, in bytes: that of the widest code
CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of the buffers and the bytes they take together."""

    offsets: tuple[int, ...]
    n_bytes: int


def ordered(network: Network) -> Network:
    """The same operations in an order in which less is alive, if it makes the array shorter."""
    least = replace(network, operations=_least_live(network))
    return least if lay_out(least).n_bytes < lay_out(network).n_bytes else network


def _least_live(network: Network) -> tuple[NetworkOperation, ...]:
    """Operations that use a buffer which one of them writes keep their order."""
    given = {value.buffer for value in network.inputs}
    writes = [operation.target.buffer for operation in network.operations]
    uses = [
        tuple(dict.fromkeys([target, *(value.buffer for value in reads(operation))]))
        for target, operation in zip(writes, network.operations, strict=True)
    ]
    problem = Problem(
        tuple(
            Operation(
                frozenset(
                    other
                    for other in range(at)
                    if writes[other] in own or writes[at] in uses[other]
                ),
                own,
            )
            for at, own in enumerate(uses)
        ),
        tuple(rounded(n) for n in network.buffers),
        frozenset(given),
        frozenset(value.buffer for value in network.outputs),
    )
    return tuple(network.operations[at] for at in problem.least_live().order)


def lay_out(network: Network) -> Layout:
    """The shortest array that was found for the buffers; see `cost_models.placement`."""
    lives = lifetimes(network)
    profiles = np.zeros((len(network.buffers), len(network.operations) + 1), np.int64)
    for buffer, (first, last) in lives.items():
        profiles[buffer, first : last + 1] = rounded(network.buffers[buffer])
    placed = place(profiles, int(profiles.sum(axis=0).max(initial=0)))
    return Layout(placed.offsets, placed.total)


def lifetimes(network: Network) -> dict[int, tuple[int, int]]:
    """Buffer to the first and last operation during which it holds something."""
    last = len(network.operations)
    lives = {value.buffer: (0, 0) for value in network.inputs}
    for at, operation in enumerate(network.operations):
        for value in (*reads(operation), operation.target):
            start, _ = lives.get(value.buffer, (at, at))
            lives[value.buffer] = (start, at)
    for value in network.outputs:
        lives[value.buffer] = (lives[value.buffer][0], last)
    return lives


def rounded(n_bytes: int) -> int:
    """Up to the next multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def cache_lines(n_bytes: int) -> int:
    """Up to the next multiple of a cache line."""
    return -(-n_bytes // CACHE_LINE) * CACHE_LINE
