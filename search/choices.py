"""Builds the search space of a traced network from what the user and the target allow."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from quant_ops.channels import bypassed_layers
from quant_ops.dual import SUFFIX, main_of
from quant_ops.edges import activation_edges
from quant_ops.errors import UsageError
from quant_ops.graph import Graph, Layer
from search.config import RunConfig
from search.space import EdgeChoice, LayerChoice, SearchSpace
from search.strategies.table import strategy_class
from search.targets import TargetCapabilities, find_target

CHANNEL_GROUPS = 4
RESIDUAL_BITS = 4  # a residual of more makes a sum that one wider tensor beats
EDGE_PREFIX = "edge:"  # of a pin's pattern
_COARSENESS = ("channel", "group", "layer")


def build_space(graph: Graph, config: RunConfig) -> SearchSpace:
    """The space of `config` on `graph`.

    Raises:
        UsageError: nothing can be quantized, a pin that names no layer, or widths that the
            target or the layer cannot have.
    """
    target = find_target(config.target)
    if not graph.searchable_layers:
        reasons = sorted({layer.reason for layer in graph.layers}) or ["it has no weights"]
        raise UsageError(
            f"the model has no layer that can be quantized ({'; '.join(reasons)}); convolutions, "
            f"linear layers and embeddings can"
        )
    pins = _resolve_pins(graph, config)
    bypassed = bypassed_layers(graph)
    granularity = _granularity(config, target)
    layers = tuple(
        _layer_choice(layer, config, target, pins, layer.name in bypassed, granularity)
        if layer.name not in main_of(graph)
        else _residual_choice(layer, main_of(graph)[layer.name], config, target, pins, granularity)
        for layer in graph.searchable_layers
    )
    edges = _edges(graph, config, target)
    return SearchSpace(graph, layers, edges, config.scheme, target.granularity)


def _granularity(config: RunConfig, target: TargetCapabilities) -> str:
    """As asked; "auto" is per layer, unless a strategy of the run is for channels alone."""
    finest = target.granularity
    if config.granularity == "auto":
        by_layer = all("layer" in strategy_class(s).traits.granularity for s in config.strategies)
        return "layer" if by_layer else finest
    if _COARSENESS.index(config.granularity) < _COARSENESS.index(finest):
        raise UsageError(
            f"target {target.name!r} has one width per {finest}, --granularity "
            f"{config.granularity} asks for finer; choose {finest} or another target"
        )
    return config.granularity


def _resolve_pins(graph: Graph, config: RunConfig) -> dict[str, float]:
    residual = main_of(graph)
    names = [layer.name for layer in graph.searchable_layers]
    pins: dict[str, float] = {}
    for pattern, bit_width in config.pins.items():
        if pattern.startswith(EDGE_PREFIX):
            continue
        matched = [
            name
            for name in names
            if fnmatchcase(name, pattern) and (name not in residual or pattern.endswith(SUFFIX))
        ]
        if not matched:
            raise UsageError(
                f"--pin {pattern}={bit_width:g} names no layer that can be quantized; "
                f"`search inspect` lists them: {', '.join(names[:6])}{', ...' * (len(names) > 6)}"
            )
        pins.update(dict.fromkeys(matched, bit_width))
    return pins


def _layer_choice(
    layer: Layer,
    config: RunConfig,
    target: TargetCapabilities,
    pins: dict[str, float],
    bypassed: bool,
    granularity: str,
) -> LayerChoice:
    legal = target.widths_for(layer)
    asked = config.bits or legal
    groups = _groups(layer, granularity)
    zero = target.removes_channels and (bypassed or bool(groups))
    if layer.name in pins:
        return LayerChoice(layer.name, (_pinned(layer, pins[layer.name], legal, bypassed),))
    widths = tuple(sorted(b for b in set(asked) if b in legal and (b != 0 or zero)))
    if not widths:
        raise UsageError(
            f"layer {layer.name!r} may have {_list(legal)} bits on target {target.name!r}, "
            f"--bits allows {_list(asked)}: nothing is left; widen --bits or pin the layer"
        )
    return LayerChoice(layer.name, widths, groups, may_vanish=bypassed)


def _residual_choice(
    layer: Layer,
    main: str,
    config: RunConfig,
    target: TargetCapabilities,
    pins: dict[str, float],
    granularity: str,
) -> LayerChoice:
    """0 is legal whatever target and `--bits`: a residual layer that is not used is not there."""
    legal = residual_widths(layer, target)
    if layer.name in pins:
        width = _pinned(layer, pins[layer.name], (0.0, *legal), bypassed=True)
        return LayerChoice(layer.name, (width,), residual_of=main)
    allowed = (b for b in legal if not config.bits or b in config.bits)
    groups = _groups(layer, granularity)
    return LayerChoice(layer.name, (0.0, *sorted(allowed)), groups, residual_of=main)


def residual_widths(layer: Layer, target: TargetCapabilities) -> list[float]:
    """Widths but 0 that the residual of a layer may have."""
    return [b for b in target.widths_for(layer) if 0 < b <= RESIDUAL_BITS]


def _pinned(layer: Layer, bit_width: float, legal: Sequence[float], bypassed: bool) -> float:
    if bit_width not in legal:
        raise UsageError(
            f"layer {layer.name!r} is pinned to {bit_width:g} bits; legal are {_list(legal)}"
        )
    if bit_width == 0 and not bypassed:
        raise UsageError(
            f"layer {layer.name!r} cannot be pinned to 0 bits: no addition bypasses it, so the "
            f"network would be cut; pin it to 1 or more"
        )
    return bit_width


def _groups(layer: Layer, granularity: str) -> tuple[tuple[int, ...], ...]:
    n = layer.out_channels
    if granularity == "layer" or layer.kind == "embedding" or n < 2:
        return ()
    size = 1 if granularity == "channel" else -(-n // CHANNEL_GROUPS)
    return tuple(tuple(range(i, min(i + size, n))) for i in range(0, n, size))


def _edges(graph: Graph, config: RunConfig, target: TargetCapabilities) -> tuple[EdgeChoice, ...]:
    widths = config.activation_bits or target.usual_activation_bits or target.activation_bits
    if not widths:
        pinned = next((p for p in config.pins if p.startswith(EDGE_PREFIX)), None)
        if pinned is not None:
            raise UsageError(f"--pin {pinned} needs quantized activations: add --activation-bits 8")
        return ()
    illegal = [b for b in widths if target.activation_bits and b not in target.activation_bits]
    if illegal:
        raise UsageError(
            f"target {target.name!r} runs activations of {_list(target.activation_bits)} bits, "
            f"--activation-bits asks for {_list(illegal)}"
        )
    edges = [edge for edge in activation_edges(graph) if edge.kind not in ("output", "partial")]
    pins = _resolve_edge_pins([edge.name for edge in edges], config)
    choices = []
    for edge in edges:
        legal = (8,) if edge.kind == "input" else tuple(sorted(set(widths)))
        choices.append(EdgeChoice(edge.name, pins.get(edge.name, legal)))
    return tuple(choices)


def _resolve_edge_pins(names: Sequence[str], config: RunConfig) -> dict[str, tuple[int]]:
    """Edge name to its one width, for patterns `edge:NAME`."""
    pins: dict[str, tuple[int]] = {}
    for pattern, bit_width in config.pins.items():
        if not pattern.startswith(EDGE_PREFIX):
            continue
        matched = [n for n in names if fnmatchcase(n, pattern.removeprefix(EDGE_PREFIX))]
        if not matched:
            raise UsageError(
                f"--pin {pattern}={bit_width:g} names no activation edge; `search inspect "
                f"--activation-bits 8` lists them: {', '.join(names[:6])}"
                f"{', ...' * (len(names) > 6)}"
            )
        if not 2 <= bit_width <= 8 or bit_width != int(bit_width):
            raise UsageError(f"--pin {pattern} takes whole numbers from 2 to 8, got {bit_width:g}")
        pins.update(dict.fromkeys(matched, (int(bit_width),)))
    return pins


def _list(widths: Sequence[float]) -> str:
    return ", ".join(f"{b:g}" for b in widths)
