"""Which calls to measure: those of a network and of its pruned versions, or a grid of sizes."""

import math
from collections.abc import Callable, Iterable
from itertools import product

from cost_models.latency.lowering import calls_of
from cost_models.latency.roofline import LEAST_RESIDENT
from cost_models.latency.work import DEPTHWISE, Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.graph import Graph
from quant_ops.removal import NOTHING

Pair = tuple[Work, str]  # what is computed, by which kernel
Call = tuple[Work, str, int]  # and the bytes of weights that are read in turn with its own
CONTEXT_STEP = 2.0  # contexts that differ by less are one
KernelFor = Callable[[str, int, int], str]
WeightBytes = Callable[[Work, str], float]

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the channels that a pruned layer keeps
RAGGED_SHARES = (0.85, 0.6, 0.35)  # likewise, with an odd number of channels left
FIXED_CHANNELS = 4  # so few input channels are an image's, which are never pruned
INTEGER_WIDTHS = (8, 4)  # of weights and inputs alike
WEIGHT_WIDTHS = (8, 4, 2)
SMALL_WALK = 12
_GRID_WIDTHS = (
    (FLOAT_BITS, FLOAT_BITS),
    *((b, b) for b in INTEGER_WIDTHS),
    *((b, FLOAT_BITS) for b in WEIGHT_WIDTHS),
)  # of weights, of inputs

CONVERSIONS = ("quantize", "dequantize", "layout", "add")


def _runs(size: int) -> list[int]:
    return sorted({1, min(size, 16), round(size**0.7), size})


def task_walks(
    graph: Graph, kernel_for: KernelFor, weight_bytes: WeightBytes, *, pruned: bool = True
) -> list[list[Call]]:
    """Lists of calls; each is measured in turn from first to last, as a network would run them.

    A kernel that finds its weights in the cache because it alone was run before is faster than
    it is in a network, so every walk has the weights of a whole network at one width.
    """
    networks = [Candidate.of({}), *_uniform(graph)]
    walks = _Walks(weight_bytes)
    for share in (*SHARES, *RAGGED_SHARES) if pruned else SHARES[:1]:
        for candidate in networks:
            calls = calls_of(graph, candidate, NOTHING, kernel_for)
            pairs = [(c.work, c.kernel) for c in calls if c.kernel]
            walk = [(_pruned(work, share), kernel) for work, kernel in pairs]
            walks.add(walk)
    extremes = _extremes if pruned else lambda work: [work]
    for candidate in networks:
        calls = calls_of(graph, candidate, NOTHING, kernel_for)
        pairs = [(c.work, c.kernel) for c in calls if c.kernel]
        apart = [(alone, k) for work, k in pairs for alone in _parts(work)]
        walks.add([(w, k) for work, k in (*pairs, *apart) for w in extremes(work)])
    walks.add(_conversions(graph, kernel_for))
    return walks.found


def _parts(work: Work) -> list[Work]:
    """A convolution without its addition, for candidates that cannot fuse the two."""
    return [work.without_addition()] if work.adds else []


def _conversions(graph: Graph, kernel_for: KernelFor) -> list[Pair]:
    """Changes of type and layout, copies and sums at sizes from one element to the largest value.

    They are needed where a candidate has floats on one side and codes on the other.
    """
    largest = max(math.prod(node.shape) for node in graph.nodes if node.dtype)
    sizes = sorted({round(largest**exponent) for exponent in (0, 0.5, 0.7, 0.8, 0.9, 1)})
    works = [Work(operator, (size,)) for operator in CONVERSIONS for size in sizes]
    works += [Work("copy", (size, run)) for size in sizes for run in _runs(size)]
    found = [(work, kernel_for(work.operator, 0, b)) for work in works for b in (8, FLOAT_BITS)]
    return [(work, kernel) for work, kernel in found if kernel]


def grid_walks(kernel_for: KernelFor, weight_bytes: WeightBytes) -> list[list[Call]]:
    """A grid of sizes that many networks fall into, for a table that serves them all.

    Each in a small network, whose weights stay in a cache, and in one of all others.
    """
    works = _grid()
    walks = _Walks(weight_bytes)
    for weight_bits, activation_bits in _GRID_WIDTHS:
        chosen = [(w, kernel_for(w.operator, weight_bits, activation_bits)) for w in works]
        chosen = [(work, kernel) for work, kernel in chosen if kernel]
        walks.add(chosen)
        for start in range(0, len(chosen), SMALL_WALK):
            walks.add(chosen[start : start + SMALL_WALK])
    return walks.found


class _Walks:
    """Walks so far; a call is walked again only where the weights around it are others."""

    def __init__(self, weight_bytes: WeightBytes) -> None:
        self.found: list[list[Call]] = []
        self._weight_bytes = weight_bytes
        self._seen: set[tuple[Work, str, int]] = set()

    def add(self, walk: Iterable[Pair]) -> None:
        """A walk, less what is known from one of about as many weights."""
        pairs = list(walk)
        resident = sum(self._weight_bytes(*pair) for pair in pairs)
        step = round(math.log(max(resident, LEAST_RESIDENT), CONTEXT_STEP))
        fresh: list[Call] = []
        for work, kernel in pairs:
            heavy = self._weight_bytes(work, kernel) > 0
            key = (work, kernel, step if heavy else 0)
            if key not in self._seen:
                fresh.append((work, kernel, int(resident) if heavy else 0))
        self._seen |= {(work, kernel, step if context else 0) for work, kernel, context in fresh}
        if fresh:
            self.found.append(fresh)


def _uniform(graph: Graph) -> list[Candidate]:
    """Everything on integers, then weights alone, at every width that has a kernel."""
    edges = [e.name for e in activation_edges(graph) if e.kind not in ("output", "partial")]
    names = [layer.name for layer in graph.searchable_layers]
    out = [
        Candidate.of(dict.fromkeys(names, float(b)), dict.fromkeys(edges, b))
        for b in INTEGER_WIDTHS
    ]
    return [*out, *(Candidate.of(dict.fromkeys(names, float(b))) for b in WEIGHT_WIDTHS)]


def _pruned(work: Work, share: float) -> Work:
    """The call in a network whose layers keep this share of their channels."""
    if work.operator == "conv":
        kept = _kept(work.dim("out_channels"), share)
        (groups,) = work.attribute("groups")
        if groups == DEPTHWISE:
            return work.with_dims(in_channels=kept, out_channels=kept)
        if groups > 1:
            return work
        n_in = work.dim("in_channels")
        inner = n_in if n_in <= FIXED_CHANNELS else _kept(n_in, share)
        return work.with_dims(in_channels=inner, out_channels=kept)
    if work.operator == "linear":
        n_in, n_out, _ = work.dims
        return work.with_dims(in_features=_kept(n_in, share), out_features=_kept(n_out, share))
    if "channels" in (names := work.names):
        return work.with_dims(channels=_kept(work.dim("channels"), share))
    if work.operator == "copy":
        elements = _kept(work.dim("elements"), share)
        return work.with_dims(elements=elements, run=min(work.dim("run"), elements))
    return work.with_dims(**{name: _kept(work.dim(name), share) for name in names})


def _extremes(work: Work) -> list[Work]:
    """Half of the channels on one side only, and a single one on each."""
    if work.operator not in ("conv", "linear") or (
        work.operator == "conv" and work.attribute("groups") != (1,)
    ):
        return [_pruned(work, 0.0)]
    first, second = work.names[:2]
    n_in, n_out = work.dims[:2]
    one_in = n_in if work.operator == "conv" and n_in <= FIXED_CHANNELS else 1
    sizes = [(_kept(n_in, 0.5), n_out), (n_in, _kept(n_out, 0.5)), (one_in, n_out), (n_in, 1)]
    sizes.append((one_in, 1))
    return [work.with_dims(**{first: a, second: b}) for a, b in sizes]


def _kept(size: int, share: float) -> int:
    kept = max(1, round(share * size))
    return kept - 1 if share in RAGGED_SHARES and kept > 2 and kept % 2 == 0 else kept


def _grid() -> list[Work]:
    ladder, sizes, strides = (1, 64, 256, 1024, 2048), (1, 7, 28, 56), ((1, 1), (2, 2))
    works = [Work("linear", (a, b, 1)) for a in ladder for b in ladder]
    plain = ((1, 1), (0, 0, 0, 0)), ((3, 3), (1, 1, 1, 1))
    for (kernel, pads), stride, size in product(plain, strides, sizes):
        works += [_conv(a, b, size, kernel, stride, pads, 1) for a, b in _channel_pairs(size)]
    for stride, size, n in product(strides, sizes, (1, 16, 64, 256)):
        works.append(_conv(n, n, size, (3, 3), stride, (1, 1, 1, 1), DEPTHWISE))
    for elements in (1, 1024, 16384, 262144, 1048576):
        works += [Work(operator, (elements,)) for operator in CONVERSIONS]
        works += [Work("copy", (elements, run)) for run in _runs(elements)]
    for n, size in product((1, 16, 64, 512), (1, 4, 14, 28)):
        works.append(Work("mean", (n, size, size)))
        rows = max(size, 2)  # of a window at least
        works.append(Work("max_pool", (n, rows, rows), ((2, 2), (2, 2), (0, 0, 0, 0))))
    return works


def _channel_pairs(size: int) -> list[tuple[int, int]]:
    widest = 512 if size <= 14 else 128
    ladder = [n for n in (1, 16, 37, 64, 128, 512) if n <= widest]
    return [(a, b) for a in ladder for b in ladder]


def _conv(
    n_in: int,
    n_out: int,
    size: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    groups: int,
) -> Work:
    attributes = (kernel, stride, pads, (1, 1), (groups,), (0,))
    return Work("conv", (n_in, n_out, size, size), attributes)
