"""Appends blocks one by one, each with types that hold all that can occur in it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_ops.requantize import Integers, Rescale
from search.exporters.hls.fixed import exactly, holding
from search.exporters.hls.network import Block, Inexpressible, Value
from search.exporters.hls.rescaling import Stage, lanes_of, stages
from search.exporters.unrolled import MAX_PRODUCTS

Places = tuple[tuple[int, ...], Integers]
"""Shape of an array as hls4ml has it, and where in it each element of the graph's value lies."""


class Builder:
    """The blocks of one network so far."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._products = 0

    def append(
        self,
        block: Block,
        laid: Places,
        low: Integers,
        high: Integers,
    ) -> Value:
        """Add a block; what it writes."""
        self.blocks.append(block)
        return Value(block.name, *laid, low, high)

    def stage(self, value: Value, stage: Stage, name: str, origin: str) -> Value:
        """value * scale + offset, lane by lane, in the type of the stage."""
        lanes, laid = value.shape[-1], (value.shape, value.places)
        if (stage.scale == 1).all() and not stage.offset.any():
            # hls4ml drops a product with 1, and the change of the type with it
            same = {"activation": "linear", "n_in": int(np.prod(value.shape))}
            precision = {"result": stage.result}
            block = Block(name, "Activation", (value.block,), precision, same, origin)
            return self.append(block, laid, *stage.reach)
        scale, offset = (np.broadcast_to(x, (lanes,)) for x in (stage.scale, stage.offset))
        precision = {"scale": exactly(scale), "bias": exactly(offset), "result": stage.result}
        attributes = {
            "n_in": int(np.prod(value.shape)),
            "n_filt": lanes,
            "scale_data": scale.copy(),
            "bias_data": offset.copy(),
        }
        block = Block(name, "ApplyAlpha", (value.block,), precision, attributes, origin)
        return self.append(block, laid, *stage.reach)

    def linear(
        self,
        source: Value,
        block: tuple[str, str, str],
        weights: NDArray[np.float64],
        attributes: Mapping[str, Any],
        laid: Places,
        *,
        pads: bool = False,
    ) -> Value:
        """Sums of products, exact.

        Args:
            source: what is read, its lanes repeated along the rows of `weights`.
            block: its name, kind and origin.
            weights: (products of one sum, outputs).
            attributes: further ones of hls4ml.
            laid: of the result.
            pads: whether zeros are read beside the source.
        """
        name, kind, origin = block
        shape, _ = laid
        self._products += int(np.count_nonzero(weights)) * int(np.prod(shape[:-1], dtype=int))
        if self._products > MAX_PRODUCTS:
            reason = f"and what precedes it have more than {MAX_PRODUCTS:,} products side by side"
            raise Inexpressible(origin, reason, "search with --budget lut=..., or export it to C")
        low, high = (np.resize(x, len(weights)) for x in (source.low, source.high))
        if pads:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
        least, most = _whole(low @ positive + high @ negative, high @ positive + low @ negative)
        # what is summed so far can be the sum of any of the products
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        parts = _whole(low @ positive + high @ negative, high @ positive + low @ negative)
        precision = {
            "weight": exactly(weights),
            "bias": holding(0, 0),
            "accum": holding(int(parts[0].min()), int(parts[1].max())),
            "result": holding(int(least.min()), int(most.max())),
        }
        data = {"bias_data": np.zeros(weights.shape[1]), **attributes}
        made = Block(name, kind, (source.block,), precision, data, origin)
        return self.append(made, laid, least, most)

    def rescaled(self, rescale: Rescale, sources: list[Value], name: str, origin: str) -> Value:
        """Codes, zero point taken off, of one sum or of the scaled sum of two values."""
        value = sources[0]
        channels = _channels(rescale, value, origin)
        lanes = lanes_of(rescale, channels, [(v.low, v.high) for v in sources], origin)
        first, *rest = stages(lanes)
        if len(sources) == 1:
            value = self.stage(value, first, name, origin)
        else:
            terms = [
                self.stage(v, term, f"{name}{side}", origin)
                for v, term, side in zip(sources, lanes.terms(first), "ab", strict=True)
            ]
            names = tuple(t.block for t in terms)
            block = Block(name, "Merge", names, {"result": first.result}, {"op": "add"}, origin)
            value = self.append(block, (value.shape, value.places), *first.reach)
        for number, stage in enumerate(rest):
            value = self.stage(value, stage, f"{name}{'cd'[number]}", origin)
        return value


def _whole(low: NDArray[Any], high: NDArray[Any]) -> tuple[Integers, Integers]:
    return low.astype(np.int64), high.astype(np.int64)


def _channels(rescale: Rescale, value: Value, origin: str) -> Integers:
    """For each lane which constants of the rescaling are its."""
    numbers = np.arange(rescale.offset.size).reshape(rescale.offset.shape)
    of_element = np.zeros(int(np.prod(value.shape)), np.int64)
    try:
        spread = np.broadcast_to(numbers, (1, *value.places.shape))
    except ValueError:
        raise Inexpressible(origin, "spreads one value over another shape") from None
    of_element[value.places.reshape(-1)] = spread.reshape(-1)
    by_lane = of_element.reshape(-1, value.shape[-1])
    if (by_lane != by_lane[0]).any():
        raise Inexpressible(origin, "rescales every position by its own factor")
    lanes: Integers = by_lane[0]
    return lanes
