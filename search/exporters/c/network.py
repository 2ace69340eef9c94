"""What a generated library computes: buffers, and the operations on them, shapes all fixed.

Values with spatial axes lie channels last, since kernels read the channels of one pixel together;
other values lie as in the graph. An operation that only looks at a value in another way costs
nothing: the values share a buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quant_ops.requantize import Codes, Rescale
from search.exporters.c.moves import Axis
from search.exporters.c.weights import PackedRows

Sizes = tuple[int, int, int]  # depth, height, width
TYPES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "int32": 4}


def c_type(codes: Codes) -> str:
    """The narrowest C type that holds the codes of a value, without the suffix _t."""
    for name, n_bytes in TYPES.items():
        low = 0 if name.startswith("u") else -(2 ** (8 * n_bytes - 1))
        high = 2 ** (8 * n_bytes - (0 if name.startswith("u") else 1)) - 1
        if low <= codes.low and codes.high <= high:
            return name
    raise AssertionError(codes)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of codes in memory.

    Attributes:
        buffer: where it lies; several values may be views of one buffer.
        sizes: logical sizes without the batch.
        order: logical axes (0 is the first after the batch) in the order in which they lie.
        codes: what the integers mean.
    """

    buffer: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    codes: Codes

    @property
    def type(self) -> str:
        """C type without the suffix _t."""
        return c_type(self.codes)

    @property
    def lies(self) -> tuple[int, ...]:
        """Sizes in the order in which they lie."""
        return tuple(self.sizes[axis] for axis in self.order)

    @property
    def n(self) -> int:
        """Elements."""
        return int(np.prod(self.sizes, dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        """Size of the buffer."""
        return self.n * TYPES[self.type]


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """Convolution or linear layer; a linear layer is one with kernel 1 over rows of features.

    Attributes:
        source, target: channels last.
        sizes, kernel, stride, padding, dilation, spread, out_sizes: depth, height, width;
            `padding` counts before (negative: cropped), `spread` - 1 zeros lie between neighbours.
        channels, out_channels, groups: of the layer.
        bits: 32 or 64, of the accumulators.
    """

    name: str
    source: Value
    target: Value
    rows: PackedRows
    rescale: Rescale
    sizes: Sizes
    out_sizes: Sizes
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    spread: Sizes
    channels: int
    out_channels: int
    groups: int
    bits: int

    @property
    def row_length(self) -> int:
        """Weights of one output channel."""
        return int(np.prod(self.kernel)) * self.channels // self.groups


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Rescaled sum of values of equal shape and order.

    `inner` elements in a row share one set of the rescaling's constants.
    """

    name: str
    sources: tuple[Value, ...]
    target: Value
    rescale: Rescale
    inner: int


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Rescaled product of two values of equal shape and order."""

    name: str
    sources: tuple[Value, Value]
    target: Value
    rescale: Rescale


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Sum (rescaled), maximum or minimum over windows of a value of four axes as they lie.

    Attributes:
        kind: sum, max or min.
        sizes, out_sizes: as they lie, filled up with 1 in front.
        windows: per axis None (every position by itself) or (start, end) per output position.
        step: distance of the positions in a window, per axis.
        rescale: of a sum; one set of constants, or one for each output position of the first
            three axes.
    """

    name: str
    kind: str
    source: Value
    target: Value
    sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]
    windows: tuple[tuple[NDArray[np.int64], NDArray[np.int64]] | None, ...]
    step: tuple[int, ...]
    rescale: Rescale | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One source of a concatenation: `outer` stretches of `inner` elements, `pitch` apart."""

    name: str
    source: Value
    target: Value
    rescale: Rescale
    outer: int
    inner: int
    pitch: int
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """Codes moved by fixed loops; holes hold the zero point."""

    name: str
    source: Value
    target: Value
    start: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Relu:
    """Maximum with the zero point."""

    name: str
    source: Value
    target: Value


Operation: TypeAlias = Conv | Sum | Product | Pool | Part | Copy | Relu


@dataclass(frozen=True, eq=False)
class Network:
    """Everything that is generated.

    Attributes:
        inputs, outputs: values that the caller writes and reads; outputs lie as in the graph.
        buffers: bytes of each buffer.
        operations: in execution order.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    buffers: tuple[int, ...]
    operations: tuple[Operation, ...]


def reads(operation: Operation) -> Sequence[Value]:
    """Values that an operation reads."""
    return operation.sources if isinstance(operation, Sum | Product) else (operation.source,)
