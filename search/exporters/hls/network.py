"""A network as hls4ml's layers, before hls4ml is asked: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quant_ops.requantize import Integers
from search.exporters.base import Refusal
from search.exporters.hls.fixed import Fixed
from search.exporters.ports import Port

HOLE = -1  # in places: no element of a block, but 0


class Inexpressible(Exception):
    """hls4ml has no form for a step that is exact."""

    def __init__(self, where: str, reason: str, instead: str = "export it to C or ONNX") -> None:
        super().__init__(reason)
        self.refusal = Refusal(where, reason, instead)


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of hls4ml.

    Attributes:
        name: unique, lower case.
        kind: hls4ml's class.
        inputs: names of the blocks that are read.
        precision: of "result", "accum", "weight", "scale", "bias".
        attributes: as hls4ml names them; arrays are float64 and exact.
        origin: the graph's node that it computes a part of.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    precision: Mapping[str, Fixed]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, eq=False)
class Value:
    """What a block writes: integers, zero point taken off.

    Attributes:
        block: its name.
        shape: as hls4ml has it: (n,) or (height, width, channels).
        places: of the graph's shape; position in the flat array of each element, or HOLE. What only
            moves codes changes places alone; a layer of wires follows where a reader needs them.
        low, high: (shape[-1],) what can occur in each lane.
    """

    block: str
    shape: tuple[int, ...]
    places: Integers
    low: Integers
    high: Integers

    @property
    def is_whole(self) -> bool:
        """Whether each integer of the block is one element, so that all can be computed with."""
        return np.array_equal(np.sort(self.places, axis=None), np.arange(np.prod(self.shape)))


@dataclass(frozen=True, eq=False)
class Wiring:
    """A network input or output: what its integers mean and where they lie in the flat array."""

    port: Port
    places: Integers


@dataclass(frozen=True, eq=False)
class Network:
    """All blocks in execution order; outputs by block name."""

    blocks: tuple[Block, ...]
    inputs: tuple[tuple[str, Wiring], ...]
    outputs: tuple[tuple[str, Wiring], ...]
