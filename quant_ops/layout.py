"""Canonical weight form: (out_channels, in_channels / groups, *kernel), for every layer kind."""

from torch import Tensor

from quant_ops.graph import Layer


def to_canonical(layer: Layer, weight: Tensor) -> Tensor:
    """The operator's weight tensor in canonical form.

    A transposed convolution stores (in, out / groups, *kernel); the others are canonical already.
    """
    if layer.kind != "conv_transpose":
        return weight
    n_in, out_per_group, *kernel = weight.shape
    grouped = weight.reshape(layer.groups, n_in // layer.groups, out_per_group, *kernel)
    return grouped.transpose(1, 2).reshape(layer.out_channels, n_in // layer.groups, *kernel)


def from_canonical(layer: Layer, weight: Tensor) -> Tensor:
    """Inverse of `to_canonical`."""
    if layer.kind != "conv_transpose":
        return weight
    out_channels, in_per_group, *kernel = weight.shape
    per_group = out_channels // layer.groups
    grouped = weight.reshape(layer.groups, per_group, in_per_group, *kernel)
    return grouped.transpose(1, 2).reshape(layer.groups * in_per_group, per_group, *kernel)
