"""From candidates to quantized weights, each layer and width computed once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_ops.calibration import Calibration, choose_activation_quant
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import live_inputs
from quant_ops.correction import corrected_bias, spread_factor
from quant_ops.dual import main_of, residual_of
from quant_ops.dual_codes import Two, rows_of, sum_codes
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
from quant_ops.rounding import round_layer, round_pair
from quant_ops.stored import StoredBias, StoredScale
from quant_ops.uniform_rows import UniformRows, assembled

T = TypeVar("T")
LiveMask = NDArray[np.bool_]


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
        other = self.partners(candidate)
        layers = {
            name: self.layer(name, quant, live.get(name), other.get(name))
            for name, quant in candidate.layers
        }
        replaced = self._replaced(candidate)
        kept = {k: v for k, v in self.float_params.items() if k not in replaced}
        return QuantizedModel(self.graph, candidate, layers, self.activations(candidate), kept)

    def params(self, candidate: Candidate) -> dict[str, Tensor]:
        """What `quantize(candidate).params()` gives, bit for bit; look-ups where known."""
        live = self._live_inputs(candidate)
        other = self.partners(candidate)
        out = dict(self.float_params)
        for name, quant in candidate.layers:
            layer = self._layer_of(name)
            weight, bias = self._tensors(layer, quant, live.get(name), other.get(name))
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
        self,
        name: str,
        quant: LayerQuant,
        live_inputs: LiveMask | None = None,
        other: LayerQuant | None = None,
    ) -> QuantizedLayer:
        """One layer's codes.

        Args:
            name: the layer's name.
            quant: its widths.
            live_inputs: (in_channels,) False where the layer's input is removed, None if all
                are there. The mean effect of removed inputs moves into the bias.
            other: widths of the layer that this one is added to (see `quant_ops.dual`), whose
                codes and these are chosen together; None without one, or if it is not used.
        """
        layer = self._layer_of(name)
        live_inputs = _unless_all(live_inputs)
        mask = None if live_inputs is None else live_inputs.tobytes()
        key = ("layer", name, quant, mask, other)

        def compute() -> QuantizedLayer:
            if other is None:
                codes = self._codes(layer, quant)
                return replace(codes, bias=self._bias(layer, codes, live_inputs))
            return self._of_pair(layer, quant, live_inputs, other)

        return self._cache.get(key, compute, _layer_bytes)

    def _of_pair(
        self, layer: Layer, quant: LayerQuant, live_inputs: LiveMask | None, other: LayerQuant
    ) -> QuantizedLayer:
        main = main_of(self.graph).get(layer.name)
        if main is not None:
            return self._pair(self._layer_of(main), other, quant)[1]
        first, second = self._pair(layer, quant, other)
        return replace(first, bias=self._bias(layer, first, live_inputs, second))

    def _pair(self, layer: Layer, quant: LayerQuant, residual: LayerQuant) -> Two:
        """Codes of a layer and of the residual layer beside it, chosen together."""

        def compute() -> Two:
            weights = self.weights(layer)
            first = self._codes(layer, quant)
            left = (weights.double() - rows_of(layer, first)).float()
            uniform = {
                width: self._quantize_rows(layer, left, width, residual.scheme, residual.group_size)
                for width in sorted(set(residual.bit_widths) - {0})
            }
            second = assembled(layer, residual, uniform)
            weighted = self._range_setter == "weighted_mse"
            importance = self.importance(layer) if weighted else None
            two = sum_codes(layer, (first, second), weights, importance, quant.scheme)
            if layer.name not in self._moments:
                return two
            weight = self.float_params[layer.weight]
            return round_pair(layer, two, weight, self._moments[layer.name])[0]

        key = ("pair", layer.name, quant, residual)
        return self._cache.get(key, compute, lambda two: sum(map(_layer_bytes, two)))

    def _tensors(
        self,
        layer: Layer,
        quant: LayerQuant,
        live_inputs: LiveMask | None,
        other: LayerQuant | None,
    ) -> tuple[Tensor, Tensor | None]:
        live_inputs = _unless_all(live_inputs)

        def weight() -> Tensor:
            return self.layer(layer.name, quant, live_inputs, other).weight(layer)

        def bias() -> tuple[Tensor | None]:
            return (self.layer(layer.name, quant, live_inputs, other).bias_values(),)

        mask = None if live_inputs is None else live_inputs.tobytes()
        found = self._cache.get(("weight", layer.name, quant, other), weight, lambda w: w.nbytes)
        (found_bias,) = self._cache.get(
            ("bias", layer.name, quant, mask, other), bias, lambda _: 4 * layer.out_channels
        )
        return found, found_bias

    def _codes(self, layer: Layer, quant: LayerQuant) -> QuantizedLayer:
        """One layer alone, without its bias."""
        present = sorted(set(quant.bit_widths) - {0})
        uniform = {w: self._uniform(layer, w, quant.scheme, quant.group_size) for w in present}
        return assembled(layer, quant, uniform)

    def _bias(
        self,
        layer: Layer,
        quantized: QuantizedLayer,
        live_inputs: LiveMask | None,
        residual: QuantizedLayer | None = None,
    ) -> StoredBias | None:
        if layer.bias is None:
            return None
        wanted = self.float_params[layer.bias].double()
        if self._bias_correction and self.calibration is not None:
            found = quantized.weight(layer)
            wanted = corrected_bias(
                layer,
                wanted,
                to_canonical(layer, self.float_params[layer.weight]),
                to_canonical(layer, found if residual is None else found + residual.weight(layer)),
                self.calibration.tap_mean[layer.name],
                live_inputs,
            )
        pruned = np.asarray(quantized.bit_widths) == 0
        return StoredBias.nearest(np.where(pruned, 0.0, wanted.numpy()))

    def _uniform(
        self, layer: Layer, bit_width: float, scheme: str, group_size: int | None
    ) -> UniformRows:
        key = ("uniform", layer.name, bit_width, scheme, group_size)

        def compute() -> UniformRows:
            rows = self._quantize_rows(layer, self.weights(layer), bit_width, scheme, group_size)
            return self._rounded(layer, bit_width, rows) if layer.name in self._moments else rows

        return self._cache.get(key, compute, lambda u: u.size_bytes)

    def weights(self, layer: Layer) -> Tensor:
        """(out_channels, n) float weights."""
        weights = to_canonical(layer, self.float_params[layer.weight]).float()
        weights = weights.reshape(layer.out_channels, -1)
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"layer {layer.name!r} has NaN or infinite weights")
        return weights

    def _quantize_rows(
        self,
        layer: Layer,
        weights: Tensor,
        bit_width: float,
        scheme: str,
        group_size: int | None,
    ) -> UniformRows:
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
        return UniformRows(
            codes.reshape(shape).numpy(),
            StoredScale(scale.base, scale.ratio.reshape(shape)),
            None if zero is None else zero.reshape(shape).to(torch.int16).numpy(),
            chosen == "mid_rise",
        )

    def _rounded(self, layer: Layer, bit_width: float, rows: UniformRows) -> UniformRows:
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
        importance = self.importance(layer, group_size)
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

    def importance(self, layer: Layer, group_size: int | None = None) -> Tensor | None:
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

    def partners(self, candidate: Candidate) -> dict[str, LayerQuant]:
        """Layer name to the widths of the one it is added to, for pairs that are in use."""
        out: dict[str, LayerQuant] = {}
        assignment = candidate.assignment
        for main, residual in residual_of(self.graph).items():
            if {main, residual} <= assignment.keys() and assignment[residual].uniform != 0:
                out |= {main: assignment[residual], residual: assignment[main]}
        return out

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
