"""A network as hls4ml's layers, before hls4ml is asked: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant_ops.requantize import Integers
from search.exporters.base import Refusal
from search.exporters.hls.fixed import Fixed
from search.exporters.ports import Port


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
        places: of the graph's shape; position in the flat array of each element.
        low, high: (shape[-1],) what can occur in each lane.
    """

    block: str
    shape: tuple[int, ...]
    places: Integers
    low: Integers
    high: Integers


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
