"""A quantized network in training: what its forward pass computes is what is packed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant_ops.calibration import ChannelSums
from quant_ops.edges import activation_edges
from quant_ops.executor import Executor, Transform
from quant_ops.graph import Graph, Params
from quant_ops.qat.activations import LearnedActivation
from quant_ops.qat.layer import TrainedLayer
from quant_ops.qat.norm import ChannelNorm
from quant_ops.qat.weights import LearnedStep
from quant_ops.quantized import QuantizedModel


class QuantizedNetwork(nn.Module):
    """A `QuantizedModel` whose weights, steps, biases and float parameters can be trained.

    Without norms the network starts exactly as the given model computes, and `to_model` is the
    forward pass exactly at any time: same codes, scales and biases. `start_norms` gives layers a
    batch norm back; `fold_norms` makes it part of scales and biases again and leaves every code
    as it is, so that the last part of a training trains what is packed.

    The children do the work: `layers` (by position, names in `layer_names`) and `activations`.

    Args:
        graph: the folded network.
        params: its float parameters.
        start: widths, codes, scales, biases and ranges to start from.
        quantizers: layer name to a module from real weights (out_channels, n) to quantized ones,
            for layers whose steps are not learned.
        weight_rule: see `LearnedStep`.
        activation_rule: see `LearnedActivation`.
        inside: see `TrainedLayer`.
    """

    has_norms: Tensor

    def __init__(
        self,
        graph: Graph,
        params: Params,
        start: QuantizedModel,
        *,
        quantizers: Mapping[str, nn.Module] | None = None,
        weight_rule: str = "lsq",
        activation_rule: str = "lsq",
        inside: float = 0.49,
    ) -> None:
        super().__init__()
        self.graph = graph
        self._start = start
        self._executor = Executor(graph)
        self.layer_names = tuple(start.layers)
        self.layers = nn.ModuleList(
            TrainedLayer(
                graph.layer_of[name],
                params[graph.layer_of[name].weight],
                quantized,
                quantizer=(quantizers or {}).get(name),
                rule=weight_rule,
                inside=inside,
            )
            for name, quantized in start.layers.items()
        )
        edges = {edge.name: edge.node for edge in activation_edges(graph)}
        self._edges = [(name, edges[name]) for name in start.activations]
        self.activations = nn.ModuleList(
            LearnedActivation.of(start.activations[name], activation_rule)
            for name, _ in self._edges
        )
        self._float_names = tuple(start.float_params)
        for position, tensor in enumerate(start.float_params.values()):
            value = tensor.detach().clone()
            if value.is_floating_point():
                self.register_parameter(f"float{position}", nn.Parameter(value))
            else:
                self.register_buffer(f"float{position}", value)
        self.register_buffer("has_norms", torch.zeros(len(self.layers), dtype=torch.bool))
        self.register_load_state_dict_pre_hook(_with_the_norms_of)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of the graph; differentiable where gradients are enabled."""
        return self._executor.apply(self._params(), inputs, self._transforms())

    def trained_layers(self) -> dict[str, TrainedLayer]:
        """Layer name to module."""
        layers = [m for m in self.layers if isinstance(m, TrainedLayer)]
        return dict(zip(self.layer_names, layers, strict=True))

    def start_norms(
        self, names: Iterable[str], batches: Iterable[tuple[Sequence[Tensor], Any]]
    ) -> None:
        """Give layers a norm under which the network computes what it computes now.

        Args:
            names: of layers called once, with a bias; others are passed over.
            batches: (inputs, target) pairs whose statistics the norms start with.
        """
        layers = self.trained_layers()
        chosen = [n for n in names if n in layers and _may_be_normed(layers[n])]
        sums = self._output_sums(chosen, batches)
        for name in chosen:
            position = self.layer_names.index(name)
            self._add_norm(position)
            layers[name].start_norm(sums[name].mean().float(), sums[name].std().float().square())
        if chosen:
            self._set_on_grid(False)

    def estimate_norms(self, batches: Iterable[tuple[Sequence[Tensor], Any]]) -> None:
        """Set running statistics to those of the present weights on these batches [Sun2019].

        Each layer meets what the norms before it make of the batch at hand.
        """
        normed = [name for name, layer in self.trained_layers().items() if layer.norm is not None]
        for name, sums in self._output_sums(normed, batches).items():
            norm = self.trained_layers()[name].norm
            assert norm is not None
            norm.restart(sums.mean().float(), sums.std().square().float())

    def fold_norms(self) -> None:
        """Make every norm part of its layer's scales and bias, and round those as they are stored.

        Codes stay as they are; outputs change by what rounding of the scales changes.
        """
        for layer in self.trained_layers().values():
            layer.fold()
        self.has_norms.zero_()
        self._set_on_grid(True)

    def to_model(self) -> QuantizedModel:
        """The network as it is packed, on the CPU.

        Raises:
            ValueError: there are norms that are not folded.
            TypeError: a layer's quantizer does not say how its values are stored.
        """
        if bool(self.has_norms.any()):
            raise ValueError("call fold_norms() first: a packed network has no batch norms")
        edges = zip(self._edges, self.activations, strict=True)
        activations = {
            name: module.stored()
            for (name, _), module in edges
            if isinstance(module, LearnedActivation)
        }
        return replace(
            self._start,
            layers={name: layer.stored() for name, layer in self.trained_layers().items()},
            activations=activations,
            float_params={n: t.detach().cpu() for n, t in self._floats().items()},
        )

    def float_params(self) -> dict[str, Tensor]:
        """Latent weights and biases as float parameters of the graph, norms folded in.

        What a `WeightBank` quantizes at other widths to train on from there.
        """
        out = {name: tensor.detach() for name, tensor in self._floats().items()}
        for name, trained in self.trained_layers().items():
            layer = self.graph.layer_of[name]
            out[layer.weight] = trained.float_weight()
            bias = trained.float_bias()
            if layer.bias is not None and bias is not None:
                out[layer.bias] = bias
        return {name: tensor.cpu() for name, tensor in out.items()}

    def layer_outputs(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Layer name to its output at its last call, norm included, in the order of calls."""
        outputs: dict[str, Tensor] = {}
        transforms = self._transforms()
        for name in self.layer_names:
            for site in self.graph.layer_of[name].sites:
                transforms[site] = _chained(transforms.get(site), partial(_keep, outputs, name))
        with torch.no_grad():
            self._executor.apply(self._params(), inputs, transforms)
        return outputs

    def _params(self) -> dict[str, Any]:
        out: dict[str, Any] = dict(self._floats())
        for name, trained in self.trained_layers().items():
            layer = self.graph.layer_of[name]
            out[layer.weight] = trained.weight()
            if layer.bias is not None:
                out[layer.bias] = trained.live_bias() if trained.norm is None else None
        return out

    def _floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"float{i}") for i, name in enumerate(self._float_names)}

    def _transforms(self) -> dict[int, Transform]:
        out: dict[int, Transform] = {}
        for name, trained in self.trained_layers().items():
            if trained.norm is not None:
                out[self.graph.layer_of[name].sites[0]] = trained.normed
        for (_, node), module in zip(self._edges, self.activations, strict=True):
            out[node] = _chained(out.get(node), module)
        return out

    def _output_sums(
        self,
        names: Sequence[str],
        batches: Iterable[tuple[Sequence[Tensor], Any]],
    ) -> dict[str, ChannelSums]:
        layers = self.trained_layers()
        sums = {name: ChannelSums() for name in names}
        device = self.has_norms.device
        with torch.no_grad():
            for inputs, _ in batches:
                transforms = self._transforms()
                for name in names:
                    site = self.graph.layer_of[name].sites[0]
                    step = _Observed(layers[name], sums[name])
                    quantizer = self._quantizer_at(site)
                    transforms[site] = step if quantizer is None else _chained(step, quantizer)
                given = [x.to(device) for x in inputs]
                self._executor.apply(self._params(), given, transforms)
        return sums

    def _quantizer_at(self, node: int) -> nn.Module | None:
        for (_, at), module in zip(self._edges, self.activations, strict=True):
            if at == node:
                return module
        return None

    def _add_norm(self, position: int) -> None:
        trained = self.layers[position]
        assert isinstance(trained, TrainedLayer)
        norm = ChannelNorm(trained.layer.out_channels).to(trained.latent.device)
        trained.norm = norm.train(self.training)
        self.has_norms[position] = True

    def _set_on_grid(self, on_grid: bool) -> None:
        for layer in self.trained_layers().values():
            if isinstance(layer.quantizer, LearnedStep):
                layer.quantizer.on_grid = on_grid


class _Observed:
    """Adds a layer's output to its sums, and gives what follows of it."""

    def __init__(self, trained: TrainedLayer, sums: ChannelSums) -> None:
        self._trained, self._sums = trained, sums

    def __call__(self, y: Tensor) -> Tensor:
        self._sums.add(y.float(), -1 if y.dim() == 2 else 1)
        norm = self._trained.norm
        if norm is None:
            return y
        was_training = norm.training
        kept = norm.mean.clone(), norm.var.clone()
        norm.train()
        try:
            return self._trained.normed(y)
        finally:
            norm.train(was_training)
            norm.restart(*kept)


def _keep(outputs: dict[str, Tensor], name: str, y: Tensor) -> Tensor:
    outputs[name] = y
    return y


def _may_be_normed(trained: TrainedLayer) -> bool:
    layer = trained.layer
    return (
        trained.bias is not None
        and trained.norm is None
        and layer.kind != "embedding"
        and len(layer.sites) == 1
    )


def _chained(first: Transform | None, second: Transform) -> Transform:
    return second if first is None else lambda x: second(first(x))


def _with_the_norms_of(
    network: nn.Module, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Before a state is loaded: have norms where that state has them."""
    assert isinstance(network, QuantizedNetwork)
    found = state.get(f"{prefix}has_norms")
    if found is None:
        return
    for position, has_norm in enumerate(found.tolist()):
        trained = network.layers[position]
        assert isinstance(trained, TrainedLayer)
        if has_norm and trained.norm is None:
            network._add_norm(position)
        elif not has_norm:
            trained.norm = None
    network._set_on_grid(not bool(found.any()))
