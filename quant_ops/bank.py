"""From candidates to quantized weights, each layer and width computed once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.calibration import Calibration, choose_activation_quant
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import live_inputs
from quant_ops.correction import corrected_bias, spread_factor
from quant_ops.graph import Graph, Layer, Params
from quant_ops.layout import to_canonical
from quant_ops.moments import InputMoments
from quant_ops.quantized import ActivationQuant, QuantizedLayer, QuantizedModel
from quant_ops.quantizers import (
    Levels,
    effective_scheme,
    grouped,
    levels_of,
    nearest_codes,
    squared_errors,
)
from quant_ops.ranges import RANGE_SETTERS, weight_scales, zero_points
from quant_ops.rounding import round_layer
from quant_ops.stored import StoredBias, StoredScale

T = TypeVar("T")
LiveMask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _UniformRows:
    """A whole layer at one width. Shapes as in QuantizedLayer, all channels present."""

    codes: NDArray[np.int16]
    scale: StoredScale
    zero_points: NDArray[np.int16] | None
    mid_rise: bool

    @property
    def size_bytes(self) -> int:
        return self.codes.nbytes + self.scale.ratio.nbytes


class WeightBank:
    """Quantizes the layers of one network, remembering what it has quantized before.

    Args:
        graph: the folded network.
        params: its float parameters.
        calibration: statistics of the float network; without it there is no bias correction
            and the choice between schemes is not weighted by the layer's input.
        range_setter: a name in `quant_ops.ranges.RANGE_SETTERS`.
        activation_ranges: a name in `quant_ops.calibration.ACTIVATION_SETTERS`, None to decide by
            width.
        bias_correction: absorb the mean output error of each channel in its bias.
        spread_correction: stretch the scales such that each row keeps its spread [Banner2019].
        moments: layer name to second moments of its input: codes by second-order rounding, for
            the layers that have some; without, nearest rounding.
        memory_bytes: what all caches together may hold.
    """

    def __init__(
        self,
        graph: Graph,
        params: Params,
        calibration: Calibration | None,
        *,
        range_setter: str = "mse",
        activation_ranges: str | None = None,
        bias_correction: bool = True,
        spread_correction: bool = False,
        moments: Mapping[str, InputMoments] | None = None,
        memory_bytes: int = 1 << 30,
    ) -> None:
        if range_setter not in RANGE_SETTERS:
            raise ValueError(f"range setter {range_setter!r} is not one of {list(RANGE_SETTERS)}")
        self.graph = graph
        self.float_params = dict(params)
        self.calibration = calibration
        self._range_setter = range_setter
        self._activation_ranges = activation_ranges
        self._bias_correction = bias_correction and calibration is not None
        self._spread_correction = spread_correction
        self._moments = moments or {}
        self._cache = _ByteCache(memory_bytes)
        self._activations: dict[tuple[str, int], ActivationQuant] = {}

    def quantize(self, candidate: Candidate) -> QuantizedModel:
        """The candidate's codes, stored scales and stored biases."""
        live = self._live_inputs(candidate)
        layers = {name: self.layer(name, quant, live.get(name)) for name, quant in candidate.layers}
        replaced = self._replaced(candidate)
        kept = {k: v for k, v in self.float_params.items() if k not in replaced}
        return QuantizedModel(self.graph, candidate, layers, self.activations(candidate), kept)

    def params(self, candidate: Candidate) -> dict[str, Tensor]:
        """What `quantize(candidate).params()` gives, bit for bit; look-ups where known."""
        live = self._live_inputs(candidate)
        out = dict(self.float_params)
        for name, quant in candidate.layers:
            layer = self._layer_of(name)
            weight, bias = self._tensors(layer, quant, live.get(name))
            out[layer.weight] = weight
            if layer.bias is not None and bias is not None:
                out[layer.bias] = bias
        return out

    def activations(self, candidate: Candidate) -> dict[str, ActivationQuant]:
        """Edge name to quantizer."""
        return {
            name: self._activation(name, bit_width) for name, bit_width in candidate.activations
        }

    def layer(
        self, name: str, quant: LayerQuant, live_inputs: LiveMask | None = None
    ) -> QuantizedLayer:
        """One layer's codes.

        Args:
            name: the layer's name.
            quant: its widths.
            live_inputs: (in_channels,) False where the layer's input is removed, None if all
                are there. The mean effect of removed inputs moves into the bias.
        """
        layer = self._layer_of(name)
        live_inputs = _unless_all(live_inputs)
        key = ("layer", name, quant, None if live_inputs is None else live_inputs.tobytes())
        return self._cache.get(key, lambda: self._assemble(layer, quant, live_inputs), _layer_bytes)

    def _tensors(
        self, layer: Layer, quant: LayerQuant, live_inputs: LiveMask | None
    ) -> tuple[Tensor, Tensor | None]:
        live_inputs = _unless_all(live_inputs)

        def weight() -> Tensor:
            return self.layer(layer.name, quant, live_inputs).weight(layer)

        def bias() -> tuple[Tensor | None]:
            return (self.layer(layer.name, quant, live_inputs).bias_values(),)

        mask = None if live_inputs is None else live_inputs.tobytes()
        found = self._cache.get(("weight", layer.name, quant), weight, lambda w: w.nbytes)
        (found_bias,) = self._cache.get(
            ("bias", layer.name, quant, mask), bias, lambda _: 4 * layer.out_channels
        )
        return found, found_bias

    def _assemble(
        self, layer: Layer, quant: LayerQuant, live_inputs: LiveMask | None
    ) -> QuantizedLayer:
        bit_widths = quant.per_channel(layer.out_channels)
        widths = np.asarray(bit_widths)
        present = sorted(set(bit_widths) - {0})
        uniform = {w: self._uniform(layer, w, quant.scheme, quant.group_size) for w in present}
        if quant.uniform:
            return self._whole(layer, quant.uniform, uniform[quant.uniform], live_inputs)
        codes = np.zeros((layer.out_channels, layer.weights_per_channel), np.int16)
        zeros: NDArray[np.int16] | None = None
        if quant.scheme == "affine":
            n_groups = layer.weights_per_channel // (quant.group_size or layer.weights_per_channel)
            zeros = np.zeros((layer.out_channels, max(1, n_groups)), np.int16)
        for width, whole in uniform.items():
            rows = widths == width
            codes[rows] = whole.codes[rows]
            if zeros is not None and whole.zero_points is not None:
                zeros[rows] = whole.zero_points[rows]
        scales = {
            w: StoredScale(u.scale.base, u.scale.ratio[widths == w]) for w, u in uniform.items()
        }
        mid_rise = frozenset(w for w, u in uniform.items() if u.mid_rise)
        assembled = QuantizedLayer(bit_widths, codes, scales, mid_rise, zeros, None)
        return replace(assembled, bias=self._bias(layer, assembled, live_inputs))

    def _whole(
        self, layer: Layer, bit_width: float, rows: _UniformRows, live_inputs: LiveMask | None
    ) -> QuantizedLayer:
        """A layer of one width shares the cached arrays."""
        quantized = QuantizedLayer(
            (bit_width,) * layer.out_channels,
            rows.codes,
            {bit_width: rows.scale},
            frozenset({bit_width} if rows.mid_rise else ()),
            rows.zero_points,
            None,
        )
        return replace(quantized, bias=self._bias(layer, quantized, live_inputs))

    def _bias(
        self, layer: Layer, quantized: QuantizedLayer, live_inputs: LiveMask | None
    ) -> StoredBias | None:
        if layer.bias is None:
            return None
        wanted = self.float_params[layer.bias].double()
        if self._bias_correction and self.calibration is not None:
            wanted = corrected_bias(
                layer,
                wanted,
                to_canonical(layer, self.float_params[layer.weight]),
                to_canonical(layer, quantized.weight(layer)),
                self.calibration.tap_mean[layer.name],
                live_inputs,
            )
        pruned = np.asarray(quantized.bit_widths) == 0
        return StoredBias.nearest(np.where(pruned, 0.0, wanted.numpy()))

    def _uniform(
        self, layer: Layer, bit_width: float, scheme: str, group_size: int | None
    ) -> _UniformRows:
        key = ("uniform", layer.name, bit_width, scheme, group_size)

        def compute() -> _UniformRows:
            rows = self._quantize_rows(layer, bit_width, scheme, group_size)
            return self._rounded(layer, bit_width, rows) if layer.name in self._moments else rows

        return self._cache.get(key, compute, lambda u: u.size_bytes)

    def _quantize_rows(
        self, layer: Layer, bit_width: float, scheme: str, group_size: int | None
    ) -> _UniformRows:
        weights = to_canonical(layer, self.float_params[layer.weight]).float()
        weights = weights.reshape(layer.out_channels, -1)
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"layer {layer.name!r} has NaN or infinite weights")
        rows = grouped(weights, group_size).contiguous()
        zero: Tensor | None = None
        if scheme == "affine":
            binary_or_ternary = bit_width < 2
            zero = (
                torch.ones(rows.shape[0], 1, dtype=torch.long)
                if binary_or_ternary
                else zero_points(rows, bit_width)
            )
        chosen, levels, scale = self._choose(layer, rows, bit_width, scheme, group_size, zero)
        codes = nearest_codes(rows, torch.from_numpy(scale.values)[:, None], levels)
        if self._spread_correction:
            before = torch.from_numpy(scale.values)
            factor = spread_factor(rows, (codes + levels.offset) * before[:, None])
            scale = StoredScale.nearest((before * factor).numpy())
        if zero is not None:
            codes = codes + zero.to(torch.int16)
        shape = (layer.out_channels, -1)
        return _UniformRows(
            codes.reshape(shape).numpy(),
            StoredScale(scale.base, scale.ratio.reshape(shape)),
            None if zero is None else zero.reshape(shape).to(torch.int16).numpy(),
            chosen == "mid_rise",
        )

    def _rounded(self, layer: Layer, bit_width: float, rows: _UniformRows) -> _UniformRows:
        """The same with second-order codes, and scales to match."""
        mid_rise = frozenset({bit_width} if rows.mid_rise else ())
        widths = (bit_width,) * layer.out_channels
        nearest = QuantizedLayer(
            widths, rows.codes, {bit_width: rows.scale}, mid_rise, rows.zero_points, None
        )
        weight = self.float_params[layer.weight]
        rounded, _ = round_layer(layer, nearest, weight, self._moments[layer.name])
        return replace(rows, codes=rounded.codes, scale=rounded.scales[bit_width])

    def _choose(
        self,
        layer: Layer,
        rows: Tensor,
        bit_width: float,
        scheme: str,
        group_size: int | None,
        zero: Tensor | None,
    ) -> tuple[str, Levels, StoredScale]:
        """Scheme, levels and scales; for "auto" those of the smaller error over the layer."""
        importance = self._importance(layer, group_size)
        weighting = importance if self._range_setter == "weighted_mse" else None
        tried = ("mid_tread", "mid_rise") if scheme == "auto" else (scheme,)
        options = []
        for name in dict.fromkeys(effective_scheme(bit_width, s) for s in tried):
            levels = levels_of(bit_width, name, zero)
            scale = weight_scales(rows, bit_width, levels, self._range_setter, weighting)
            options.append((name, levels, scale))
        if len(options) == 1:
            return options[0]
        errors = [
            float(squared_errors(rows, torch.from_numpy(s.values)[None], v, importance).sum())
            for _, v, s in options
        ]
        return options[int(np.argmin(errors))]

    def _importance(self, layer: Layer, group_size: int | None) -> Tensor | None:
        """The mean square input of each weight, (1 or rows, n), or None without calibration."""
        if self.calibration is None or layer.name not in self.calibration.input_square:
            return None
        square = self.calibration.input_square[layer.name].reshape(layer.groups, -1)
        per_weight = square.repeat_interleave(layer.weights_per_channel // square.shape[1], dim=1)
        if layer.groups > 1 or group_size is not None:
            per_weight = per_weight.repeat_interleave(layer.out_channels // layer.groups, dim=0)
        return grouped(per_weight, group_size)

    def _activation(self, name: str, bit_width: int) -> ActivationQuant:
        if (name, bit_width) not in self._activations:
            if self.calibration is None or name not in self.calibration.edges:
                raise ValueError(f"edge {name!r} has no calibrated range")
            edge = self.calibration.edges[name]
            chosen = choose_activation_quant(edge, bit_width, self._activation_ranges)
            self._activations[name, bit_width] = chosen
        return self._activations[name, bit_width]

    def _layer_of(self, name: str) -> Layer:
        if name not in self.graph.layer_of:
            raise ValueError(f"the network has no layer {name!r}")
        return self.graph.layer_of[name]

    def _replaced(self, candidate: Candidate) -> set[str | None]:
        layers = [self._layer_of(name) for name, _ in candidate.layers]
        return {x.weight for x in layers} | {x.bias for x in layers}

    def _live_inputs(self, candidate: Candidate) -> dict[str, LiveMask]:
        if not any(0 in quant.bit_widths for _, quant in candidate.layers):
            return {}
        return dict(live_inputs(self.graph, candidate))


def _unless_all(mask: LiveMask | None) -> LiveMask | None:
    return None if mask is None or bool(mask.all()) else mask


def _layer_bytes(layer: QuantizedLayer) -> int:
    return layer.codes.nbytes + sum(s.ratio.nbytes for s in layer.scales.values())


class _ByteCache:
    """Remembers computed values, the least recently used ones forgotten first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T], size: Callable[[T], int]) -> T:
        if key in self._entries:
            self._entries.move_to_end(key)
            return cast(T, self._entries[key][0])
        value = compute()
        n_bytes = size(value)
        self._entries[key] = (value, n_bytes)
        self._held += n_bytes
        while self._held > self._limit and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self._held -= freed
        return value
