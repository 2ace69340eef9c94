"""Where every buffer lies in the static arena."""

from dataclasses import dataclass

from search.exporters.c.network import Network, reads

ALIGNMENT = 4  # of every buffer, in bytes: that of the widest code
CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of the buffers (None: never used) and the bytes they take together."""

    offsets: tuple[int, ...]
    n_bytes: int


def lay_out(network: Network) -> Layout:
    """Greedy by size: the largest buffer first, each at the lowest place that is free for it."""
    lives = lifetimes(network)
    offsets: dict[int, int] = {}
    end = 0
    for buffer in sorted(lives, key=lambda b: (-network.buffers[b], lives[b])):
        size = network.buffers[buffer]
        taken = sorted(
            (offsets[other], offsets[other] + network.buffers[other])
            for other in offsets
            if lives[other][0] <= lives[buffer][1] and lives[buffer][0] <= lives[other][1]
        )
        at = 0
        for start, stop in taken:
            if at + size <= start:
                break
            at = max(at, rounded(stop))
        offsets[buffer] = at
        end = max(end, at + size)
    return Layout(tuple(offsets.get(b, 0) for b in range(len(network.buffers))), end)


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
