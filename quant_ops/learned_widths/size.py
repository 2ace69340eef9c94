"""The length of a packed file as a differentiable function of expected widths."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.channels import analyse
from quant_ops.graph import Graph, Layer
from quant_ops.learned_widths.base import LearnedWidths
from quant_ops.packed_size import size_bytes
from quant_ops.storage import BIAS_BYTES, DTYPE_BYTES, in_channels, quantized_params, scale_groups

BITS_PER_BYTE = 8


class ExpectedSize(nn.Module):
    """Bytes of the packed file of `graph` when each channel has an expected width.

    Per channel: expected bits x stored weights / 8, one byte per scale (two with zero points) and
    two for the bias while it is live. Stored weights leave out the input channels that are
    removed: a set of tied channels (`quant_ops.channels`) is there as much as its most present
    member, so that the gradient falls on all members that are equally present. Float parameters
    that lose channels with their layer count likewise.

    What is no smooth function of the widths (graph, tables, width maps, bases of scales, whole
    bytes, the header's padding) is one constant, measured at a candidate by `refresh`: there, the
    value is `size_bytes` to the precision of float32. Elsewhere it is off by the difference of the
    constants, at most `bound()` bytes while no value of the network would lose all channels.

    Args:
        graph: the folded network.
        candidate: layers that are quantized, with scheme and widths, and quantized edges; also
            where the constant is measured first.
    """

    component: Tensor
    has_atoms: Tensor
    constant: Tensor

    def __init__(self, graph: Graph, candidate: Candidate) -> None:
        super().__init__()
        self.graph, self.candidate = graph, candidate
        analysis = analyse(graph)
        self._quants = candidate.assignment
        self._layers = [layer for layer in graph.layers if layer.name in self._quants]
        atoms = [
            analysis.component[slice(*analysis.atom_range[layer.name])] for layer in graph.layers
        ]
        component = torch.from_numpy(analysis.component)
        self.register_buffer("component", torch.cat([torch.from_numpy(a) for a in atoms]), False)
        has_atoms = torch.zeros(analysis.n_components, dtype=torch.bool)
        has_atoms[self.component] = True
        self.register_buffer("has_atoms", has_atoms, False)
        self.register_buffer("constant", torch.zeros(()))
        self._columns = _Lists(self, "columns")
        self._riders = _Lists(self, "riders")
        for layer in graph.layers:
            if layer.groups == 1 and layer.name in analysis.layer_inputs:
                slots = torch.from_numpy(analysis.layer_inputs[layer.name][0])
                self._columns[layer.name] = component[slots]
        self._bytes_per_slot: dict[str, float] = {}
        self._find_riders(component)
        self.refresh(candidate)

    def _find_riders(self, component: Tensor) -> None:
        """Float parameters that lose entries when channels are removed."""
        graph = self.graph
        dtypes = dict(graph.param_dtypes)
        quantized = quantized_params(graph, self.candidate)
        floats = {layer.weight: layer.name for layer in graph.layers}
        for name, shape in graph.param_shapes:
            if name in quantized:
                continue
            if floats.get(name, "") in self._columns:
                vector = self._columns[floats[name]]
            elif name in analyse(graph).maps.params:
                vector = component[torch.from_numpy(analyse(graph).maps.params[name][1])]
            else:
                continue
            n_bytes = DTYPE_BYTES[dtypes.get(name, "float32")] * math.prod(shape)
            self._riders[name] = vector
            self._bytes_per_slot[name] = n_bytes / len(vector)

    def forward(
        self, mean_bits: Mapping[str, Tensor], live: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Expected bytes, ().

        Args:
            mean_bits: layer name to expected bits per weight of its channels (out,); layers that
                are left out have the widths of the candidate.
            live: layer name to how much of each channel is there (out,), between 0 and 1; where
                left out, the expected bits, at most 1.
        """
        return self._smooth(mean_bits, live or {}) + self.constant

    def of(self, modules: Mapping[str, LearnedWidths]) -> Tensor:
        """Expected bytes where some layers' widths are learned, ()."""
        return self.forward(
            {name: module.mean_bits() for name, module in modules.items()},
            {name: module.live() for name, module in modules.items()},
        )

    def choice(self, modules: Mapping[str, LearnedWidths]) -> Candidate:
        """The candidate with the modules' discrete widths in place of its own."""
        return with_widths(self.candidate, {n: m.bit_widths() for n, m in modules.items()})

    def refresh(self, candidate: Candidate) -> None:
        """Measure the constant at `candidate`, which quantizes the same layers and edges."""
        bits = {
            name: self.constant.new_tensor(quant.per_channel(self._n_out(name)))
            for name, quant in candidate.layers
        }
        with torch.no_grad():
            smooth = float(self._smooth(bits, {}))
            self.constant.fill_(size_bytes(self.graph, candidate) - smooth)

    def bound(self) -> int:
        """Bytes by which the constants of two candidates of these layers can differ, at most.

        Per layer: bases and rounding of ten widths, base of the biases, the width map and the
        layer's own entry; once: the header.
        """
        per_layer = 10 * (4 + 1) + 4 + 2
        return sum(per_layer + layer.out_channels // 2 + 1 for layer in self._layers) + 16

    def _smooth(self, mean_bits: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> Tensor:
        bits = {layer.name: self._bits(layer, mean_bits) for layer in self._layers}
        there = {name: live.get(name, b.clamp(0, 1)) for name, b in bits.items()}
        present = self._present(there)
        total = self.constant.new_zeros(())
        for layer in self._layers:
            quant = self._quants[layer.name]
            n_weights = self._stored_weights(layer, present)
            aside = scale_groups(layer, quant) * (2 if quant.scheme == "affine" else 1)
            aside += BIAS_BYTES if layer.bias is not None else 0
            total = total + bits[layer.name].sum() * n_weights / BITS_PER_BYTE
            total = total + there[layer.name].sum() * aside
        for name, per_slot in self._bytes_per_slot.items():
            total = total + present[self._riders[name]].sum() * per_slot
        return total

    def _present(self, live: Mapping[str, Tensor]) -> Tensor:
        """For every set of tied channels how much of it is there."""
        rows = [
            live[layer.name].float()
            if layer.name in live
            else self.constant.new_ones(layer.out_channels)
            for layer in self.graph.layers
        ]
        base = torch.where(self.has_atoms, -1.0, 1.0)
        present = base.scatter_reduce(0, self.component, torch.cat(rows), "amax")
        pinned = torch.zeros_like(self.has_atoms)
        pinned[0] = True
        return torch.where(pinned, 1.0, present)

    def _stored_weights(self, layer: Layer, present: Tensor) -> Tensor:
        per_row = self.constant.new_tensor(float(layer.weights_per_channel))
        if layer.name not in self._columns:
            return per_row
        return per_row / in_channels(layer) * present[self._columns[layer.name]].sum()

    def _bits(self, layer: Layer, mean_bits: Mapping[str, Tensor]) -> Tensor:
        if layer.name in mean_bits:
            return mean_bits[layer.name].float()
        return self.constant.new_tensor(self._quants[layer.name].per_channel(layer.out_channels))

    def _n_out(self, name: str) -> int:
        return self.graph.layer_of[name].out_channels


def with_widths(candidate: Candidate, widths: Mapping[str, tuple[float, ...]]) -> Candidate:
    """The candidate with other widths for some layers; schemes and scale groups stay."""
    old = candidate.assignment
    changes = {
        name: LayerQuant(bit_widths, old[name].scheme, old[name].group_size)
        for name, bit_widths in widths.items()
    }
    return candidate.replace(changes)


class _Lists:
    """Index vectors by name, held as buffers of a module so that they move with it."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._module, self._prefix = module, prefix
        self._numbers: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._numbers[name] = len(self._numbers)
        self._module.register_buffer(f"_{self._prefix}{self._numbers[name]}", value, False)

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = getattr(self._module, f"_{self._prefix}{self._numbers[name]}")
        return found
