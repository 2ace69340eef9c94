"""Appends blocks one by one, each with types that hold all that can occur in it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
SPATIAL = 2


def image(shape: Sequence[int]) -> Places:
    """Where the elements of one sample (channels, *spatial) lie in an array channels last."""
    if not 2 <= len(shape) <= 1 + SPATIAL:
        return flat(shape)
    height = (1,) if len(shape) <= SPATIAL else ()
    laid = (*height, *shape[1:], shape[0])
    places = np.moveaxis(np.arange(int(np.prod(laid))).reshape(*shape[1:], shape[0]), -1, 0)
    return laid, places


def flat(shape: Sequence[int]) -> Places:
    """The elements of one sample in the graph's own order."""
    size = int(np.prod(shape, dtype=int))
    return (size,), np.arange(size).reshape(shape)


class Builder:
    """The blocks of one network so far."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._products = 0
        self._n_layings = 0

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

    def gathered(self, value: Value, positions: Integers, origin: str) -> Value:
        """Integers of a block picked by wires: at each place of `positions` the one it names.

        Args:
            value: whose block is read.
            positions: in the flat array of the block, HOLE for 0; of the result's shape.
            origin: the graph's node that reads it.
        """
        size = int(np.prod(value.shape))
        # a position of -1 finds the 0 that is last
        low, high = (np.append(np.resize(x, size), 0)[positions] for x in (value.low, value.high))
        precision = {"result": holding(int(low.min()), int(high.max()))}
        shape = positions.shape
        self._n_layings += 1
        name, taken = f"laid{self._n_layings}", positions.reshape(-1)
        kind, attributes = "Gather", {"shape": list(shape), "positions": taken}
        if np.array_equal(taken, np.arange(size)):
            kind, attributes = "Reshape", {"target_shape": list(shape)}
        block = Block(name, kind, (value.block,), precision, attributes, origin)
        laid = shape, np.arange(taken.size).reshape(shape)
        lanes = (-1, shape[-1])
        return self.append(block, laid, low.reshape(lanes).min(0), high.reshape(lanes).max(0))

    def laid(self, value: Value, laid: Places, origin: str) -> Value:
        """The same value with its elements where a reader wants them."""
        shape, places = laid
        if value.shape == shape and np.array_equal(value.places, places):
            return value
        positions = np.empty(places.size, np.int64)
        positions[places.reshape(-1)] = value.places.reshape(-1)
        return replace(self.gathered(value, positions.reshape(shape), origin), places=places)

    def flattened(self, value: Value, origin: str) -> Value:
        """Every element a lane of its own; in the order in which they lie, where they all do."""
        as_it_lies = (value.places.size,), value.places
        return self.laid(value, as_it_lies if value.is_whole else flat(value.places.shape), origin)

    def alike(self, values: Sequence[Value], shape: Sequence[int], origin: str) -> list[Value]:
        """The values spread over one shape, all lying in the same way."""
        spread = [replace(v, places=np.broadcast_to(v.places, shape)) for v in values]
        natural = image(shape)
        as_they_lie = [(v.shape, v.places) for v in spread if v.is_whole]
        usual = any(s == natural[0] and np.array_equal(p, natural[1]) for s, p in as_they_lie)
        laid = natural if usual or not as_they_lie else as_they_lie[0]
        return [self.laid(v, laid, origin) for v in spread]

    def joined(self, values: Sequence[Value], axis: int, name: str, origin: str) -> Value:
        """The values side by side along `axis` of the graph's shape, lane by lane."""
        if len({v.shape[:-1] for v in values}) > 1 or not all(v.is_whole for v in values):
            values = [self.flattened(v, origin) for v in values]
        joined, *rest = values
        for number, value in enumerate(rest):
            lanes, more = joined.shape[-1], value.shape[-1]
            low, high = (
                np.concatenate(pair)
                for pair in ((joined.low, value.low), (joined.high, value.high))
            )
            shape = (*joined.shape[:-1], lanes + more)
            before = joined.places // lanes * shape[-1] + joined.places % lanes
            after = value.places // more * shape[-1] + value.places % more + lanes
            precision = {"result": holding(int(low.min()), int(high.max()))}
            attributes = {"axis": -1, "op": f"concatenate{len(shape)}d"}
            names = joined.block, value.block
            block = Block(f"{name}n{number}", "Concatenate", names, precision, attributes, origin)
            laid = shape, np.concatenate([before, after], axis)
            joined = self.append(block, laid, low, high)
        return joined

    def product(self, values: Sequence[Value], name: str, origin: str) -> Value:
        """Two values, lying alike, multiplied element by element."""
        left, right = values
        ends = np.stack([a * b for a in (left.low, left.high) for b in (right.low, right.high)])
        low, high = ends.min(0), ends.max(0)
        precision = {"result": holding(int(low.min()), int(high.max()))}
        names = left.block, right.block
        block = Block(name, "Merge", names, precision, {"op": "multiply"}, origin)
        return self.append(block, (left.shape, left.places), low, high)

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

    def rescaled(
        self,
        rescale: Rescale,
        sources: Sequence[Value],
        shape: Sequence[int],
        name: str,
        origin: str,
    ) -> Value:
        """Codes, zero point taken off, of one sum or of the scaled sum of two values.

        Args:
            rescale: of the step.
            sources: what it reads.
            shape: of the result, as the graph has it.
            name: of the first block.
            origin: the graph's node.
        """
        sources = self.alike(sources, shape, origin)
        channels = _channels(rescale, sources[0])
        if channels is None:
            sources = [self.flattened(v, origin) for v in sources]
            channels = _channels(rescale, sources[0])
            assert channels is not None
        value = sources[0]
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
            # under the name "add" hls4ml moves equal scales behind the sum, whose type is a code's
            operation = {"op": "Add"}
            block = Block(name, "Merge", names, {"result": first.result}, operation, origin)
            value = self.append(block, (value.shape, value.places), *first.reach)
        for number, stage in enumerate(rest):
            value = self.stage(value, stage, f"{name}{'cd'[number]}", origin)
        return value


def _whole(low: NDArray[Any], high: NDArray[Any]) -> tuple[Integers, Integers]:
    return low.astype(np.int64), high.astype(np.int64)


def _channels(rescale: Rescale, value: Value) -> Integers | None:
    """For each lane which constants of the rescaling are its; None: positions have their own."""
    numbers = np.arange(rescale.offset.size).reshape(rescale.offset.shape)
    of_element = np.zeros(value.places.size, np.int64)
    spread = np.broadcast_to(numbers, (1, *value.places.shape))
    of_element[value.places.reshape(-1)] = spread.reshape(-1)
    by_lane = of_element.reshape(-1, value.shape[-1])
    if (by_lane != by_lane[0]).any():
        return None
    lanes: Integers = by_lane[0]
    return lanes
