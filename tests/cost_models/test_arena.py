"""The static arena against an exhaustive search, and against layouts worked out by hand."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from cost_models.arena import Arena, ArenaRules, plan_arena
from cost_models.cells import cells_of
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph, Node, Ref, refs_in

WIDTHS = (2, 3, 5, 8)


def random_graph(rng: np.random.Generator) -> Graph:
    """Up to four operators on vectors of different lengths."""
    nodes = [Node("input", (), "x", (1, int(rng.integers(1, 9))))]
    for index in range(1, int(rng.integers(4, 6))):
        first, second = (int(i) for i in rng.integers(0, index, 2))
        shape, other = nodes[first].shape, nodes[second].shape
        kind = int(rng.integers(3))
        if kind == 0:
            length = shape[1] + other[1]
            node = Node("cat.default", ((Ref(first), Ref(second)), 1), f"n{index}", (1, length))
        elif kind == 1 and shape == other:
            node = Node("add.Tensor", (Ref(first), Ref(second)), f"n{index}", shape)
        else:
            node = Node("tanh.default", (Ref(first),), f"n{index}", shape)
        nodes.append(node)
    outputs = {len(nodes) - 1, int(rng.integers(1, len(nodes)))}
    return Graph(tuple(nodes), tuple(Ref(i) for i in sorted(outputs)), ())


def orders(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Every order in which operands come first."""
    before = [{ref.index for ref in refs_in(node.args)} for node in graph.nodes]
    for order in itertools.permutations(range(len(graph.nodes))):
        if all(before[node] <= set(order[:step]) for step, node in enumerate(order)):
            yield order


def exhaustive(graph: Graph, sizes: dict[str, int], scratch: dict[int, int]) -> int:
    """The shortest layout of any order: every choice of overwritten operands, byte by byte."""
    cells = cells_of(graph)
    size = [sizes[graph.nodes[head].name] for head in cells.heads]
    best = sum(size) + sum(scratch.values())
    for order in orders(graph):
        lives = cells.lives(order)
        options = [
            [(cell, s) for s in sources if size[s] >= size[cell]] + [None]
            for cell, sources in lives.takes
        ]
        for chosen in itertools.product(*options):
            taken = dict(pair for pair in chosen if pair is not None)
            pieces: dict[int, dict[int, int]] = {}
            root: dict[int, int] = {}
            for cell in sorted(range(len(size)), key=lambda c: lives.first[c]):
                root[cell] = root[taken[cell]] if cell in taken else cell
                use = pieces.setdefault(root[cell], {})
                for step in range(lives.first[cell], lives.last[cell] + 1):
                    use[step] = max(use.get(step, 0), size[cell])
            uses = [*pieces.values(), *({order.index(node): n} for node, n in scratch.items())]
            best = _shortest(uses, [0] * len(graph.nodes), best)
    return best


def _shortest(uses: list[dict[int, int]], taken: list[int], best: int) -> int:
    """Every order, each piece at the first free place; `taken` has one bit per byte and step."""
    if not uses:
        return min(best, max(bits.bit_length() for bits in taken))
    for at, use in enumerate(uses):
        start = 0
        while any(taken[step] >> start & (1 << n) - 1 for step, n in use.items()):
            start += 1
        if start + max(use.values()) >= best:
            continue
        after = list(taken)
        for step, n in use.items():
            after[step] |= (1 << n) - 1 << start
        best = _shortest(uses[:at] + uses[at + 1 :], after, best)
    return best


def require_sound(graph: Graph, arena: Arena, scratch: dict[str, int]) -> None:
    """No two values share a byte while both are in use, but for one that overwrites another."""
    cells = cells_of(graph)
    order = [graph.index_of[name] for name in arena.order]
    assert tuple(order) in set(orders(graph))
    lives = cells.lives(order)
    pieces = [
        (arena.offsets[graph.nodes[head].name], arena.sizes[graph.nodes[head].name], first, last)
        for head, first, last in zip(cells.heads, lives.first, lives.last, strict=True)
    ]
    step = {name: at for at, name in enumerate(arena.order)}
    pieces += [(at, scratch[name], step[name], step[name]) for name, at in arena.scratch.items()]
    may_share = {
        pair for cell, sources in lives.takes for s in sources for pair in ((s, cell), (cell, s))
    }
    for (i, a), (j, b) in itertools.combinations(enumerate(pieces), 2):
        apart = a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0] or a[3] < b[2] or b[3] < a[2]
        assert apart or ((i, j) in may_share and a[0] == b[0] and (a[3] == b[2] or b[3] == a[2]))
        assert max(a[0] + a[1], b[0] + b[1]) <= arena.total_bytes


@pytest.mark.parametrize("seed", range(200))
def test_an_arena_is_as_short_as_the_shortest(seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    widths = {node.name: int(rng.choice(WIDTHS)) for node in graph.nodes}
    needs = {i: int(rng.integers(1, 5)) for i in range(len(graph.nodes)) if rng.random() < 0.12}
    alignment = int(rng.choice((1, 2, 4)))
    rules = ArenaRules(alignment=alignment, scratch=lambda graph, candidate, i: needs.get(i, 0))
    arena = plan_arena(graph, Candidate.of({}, widths), rules)
    scratch = {i: -(-n // alignment) * alignment for i, n in needs.items()}
    require_sound(graph, arena, {graph.nodes[i].name: n for i, n in scratch.items()})
    assert all(offset % alignment == 0 for offset in arena.offsets.values())
    assert arena.is_optimal
    assert arena.total_bytes == exhaustive(graph, dict(arena.sizes), scratch)
