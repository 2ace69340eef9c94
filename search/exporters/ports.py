"""What the integers mean that enter and leave the logic of a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_ops.requantize import Codes, Integers, Rescale


@dataclass(frozen=True, eq=False)
class Port:
    """One network input or output.

    Attributes:
        codes: what its integers mean.
        shape: of one sample.
        rescale: of an output that leaves the logic as sums (one array of `shape` for each
            multiplier, one after the other): turns them into codes. None: codes leave the logic.
    """

    codes: Codes
    shape: tuple[int, ...]
    rescale: Rescale | None = None

    @property
    def n_words(self) -> int:
        """Integers of one sample."""
        terms = 1 if self.rescale is None else len(self.rescale.multipliers)
        return terms * int(np.prod(self.shape, dtype=int))

    def values(self, words: Integers) -> NDArray[np.float32]:
        """(n, n_words) integers that left the logic, as (n, *shape) outputs of the network."""
        if self.rescale is None:
            return self.codes.dequantize(words.reshape(-1, *self.shape))
        terms = words.reshape(len(words), -1, *self.shape).swapaxes(0, 1)
        return self.codes.dequantize(self.rescale(*terms))


def port_to_json(port: Port) -> dict[str, Any]:
    """A JSON value."""
    codes, rescale = port.codes, port.rescale
    out: dict[str, Any] = {
        "shape": list(port.shape),
        "codes": [codes.scale, codes.zero_point, codes.low, codes.high],
    }
    if rescale is not None:
        out["rescale"] = {
            "multipliers": [_array_to_json(m) for m in rescale.multipliers],
            "offset": _array_to_json(rescale.offset),
            "shift": _array_to_json(rescale.shift),
            "limits": [rescale.zero_point, rescale.low, rescale.high],
        }
    return out


def port_of(value: Mapping[str, Any]) -> Port:
    """Inverse of `port_to_json`."""
    rescale = None
    if "rescale" in value:
        found = value["rescale"]
        rescale = Rescale(
            tuple(_array_of(m) for m in found["multipliers"]),
            _array_of(found["offset"]),
            _array_of(found["shift"]),
            *(int(x) for x in found["limits"]),
        )
    scale, *limits = value["codes"]
    codes = Codes(float(scale), *(int(x) for x in limits))
    return Port(codes, tuple(int(n) for n in value["shape"]), rescale)


def _array_to_json(array: Integers) -> dict[str, list[int]]:
    return {"shape": list(array.shape), "values": array.reshape(-1).tolist()}


def _array_of(value: Mapping[str, Any]) -> Integers:
    return np.array(value["values"], np.int64).reshape(value["shape"])
