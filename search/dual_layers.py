"""Which layers get a residual layer beside them: `--dual`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from quant_ops.bank import WeightBank
from quant_ops.calibration import Calibration
from quant_ops.candidate import LayerQuant
from quant_ops.dual import can_have_residual, with_residuals
from quant_ops.dual_codes import rows_of
from quant_ops.errors import UsageError
from quant_ops.graph import Layer
from search.capture import Traced
from search.choices import residual_widths
from search.config import RunConfig
from search.targets import find_target

AUTO = "auto"
AUTO_BITS = 3  # where a well-shaped layer is still usable and a badly shaped one is not
AUTO_ERROR = 0.03  # relative squared error; 0.037 is that of long Gaussian rows
AUTO_LAYERS = 3


def dual_layers(traced: Traced, calibration: Calibration, config: RunConfig) -> tuple[str, ...]:
    """Names of the layers that `config.dual` asks for, in execution order.

    "auto": the at most three whose relative weight error at 3 bits, weighted by the mean square
    of the input that each weight meets, is largest and above 0.03.

    Raises:
        UsageError: a pattern that names no layer, or a layer that cannot have a residual.
    """
    possible = [
        layer.name for layer in traced.graph.layers if _refusal(traced, layer, config) == ""
    ]
    if tuple(config.dual) == (AUTO,):
        errors = relative_errors(traced, calibration, config, possible)
        worst = sorted((n for n in errors if errors[n] > AUTO_ERROR), key=lambda n: -errors[n])
        chosen = set(worst[:AUTO_LAYERS])
        return tuple(name for name in possible if name in chosen)
    asked: set[str] = set()
    names = [layer.name for layer in traced.graph.searchable_layers]
    for pattern in config.dual:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"--dual {pattern} names no layer that can be quantized; `search inspect` lists "
                f"them: {', '.join(names[:6])}{', ...' * (len(names) > 6)}"
            )
        asked |= set(matched)
    for name in asked - set(possible):
        reason = _refusal(traced, traced.graph.layer_of[name], config)
        raise UsageError(f"--dual: layer {name!r} cannot be a sum of two tensors: {reason}")
    return tuple(name for name in possible if name in asked)


def with_dual(traced: Traced, names: Sequence[str]) -> Traced:
    """The network with a residual layer beside each of the named ones."""
    graph, params = with_residuals(traced.graph, traced.params, names)
    return replace(traced, graph=graph, params=params)


def relative_errors(
    traced: Traced, calibration: Calibration, config: RunConfig, names: Sequence[str]
) -> Mapping[str, float]:
    """Layer name to sum(m (W - Wq)^2) / sum(m W^2) at 3 bits, m the mean square input."""
    bank = WeightBank(traced.graph, traced.params, calibration, range_setter=config.range_setter)
    errors = {}
    for name in names:
        layer = traced.graph.layer_of[name]
        weights = bank.weights(layer).double()
        importance = bank.importance(layer)
        weighting = torch.ones(1, 1) if importance is None else importance.double()
        quantized = bank.layer(name, LayerQuant((AUTO_BITS,), config.scheme))
        change = weights - rows_of(layer, quantized)
        power = float((weighting * weights.square()).sum())
        errors[name] = float((weighting * change.square()).sum()) / power if power else 0.0
    return errors


def _refusal(traced: Traced, layer: Layer, config: RunConfig) -> str:
    """Why a layer can have no residual beside it; empty where it can."""
    if not can_have_residual(traced.graph, layer):
        return layer.reason or "it is an embedding"
    if not residual_widths(layer, find_target(config.target)):
        return f"target {config.target!r} has no narrow weights"
    return ""
