"""Quantizes the weights and biases of a whole network as one vector: fewer, larger operations."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant_ops.hgq.fixed_point import train_fixed_point
from quant_ops.hgq.layers import HGQLayer
from quant_ops.hgq.quantizer import FixedPointQuantizer
from quant_ops.hgq.totals import layers_of


@dataclass(frozen=True, slots=True)
class _Piece:
    layer: HGQLayer
    quantizer: FixedPointQuantizer
    is_bias: bool

    @property
    def values(self) -> Tensor:
        values = self.layer.bias if self.is_bias else self.layer.weight
        assert values is not None
        return values


def quantize_together(model: nn.Module) -> RemovableHandle:
    """In training mode quantize parameters in one go before each forward pass of `model`.

    Results and gradients stay what they are; small layers become faster, since the time per step
    goes into the number of operations. Quantizers that follow their data (WRAP) are left alone.

    Returns:
        a handle; its `remove()` undoes this.
    """
    groups: dict[Any, list[_Piece]] = defaultdict(list)
    for layer in layers_of(model):
        pieces = [_Piece(layer, layer.weight_quantizer, is_bias=False)]
        if layer.bias_quantizer is not None:
            pieces.append(_Piece(layer, layer.bias_quantizer, is_bias=True))
        for piece in pieces:
            if not piece.quantizer.follows_range:
                key = (piece.quantizer.arithmetic, piece.quantizer.learns_total)
                groups[key].append(piece)
    several = [pieces for pieces in groups.values() if len(pieces) > 1]

    def before(module: nn.Module, inputs: Any) -> None:
        if module.training:
            for pieces in several:
                _quantize(pieces)

    return model.register_forward_pre_hook(before)


def _quantize(pieces: list[_Piece]) -> None:
    first = pieces[0].quantizer
    with torch.no_grad():
        for piece in pieces:
            piece.quantizer.constrain()
    y = train_fixed_point(
        torch.cat([piece.values.reshape(-1) for piece in pieces]),
        _joined([(piece, piece.quantizer.signed) for piece in pieces]),
        _joined([(piece, piece.quantizer.integer_bits) for piece in pieces]),
        _joined([(piece, piece.quantizer.other_bits()) for piece in pieces]),
        first.arithmetic,
        other_is_total=first.learns_total,
    )
    parts = torch.split(y, [piece.values.numel() for piece in pieces])
    for piece, part in zip(pieces, parts, strict=True):
        piece.layer.prepare(part.view(piece.values.shape), is_bias=piece.is_bias)


def _joined(parts: list[tuple[_Piece, Tensor]]) -> Tensor:
    return torch.cat([bits.expand(piece.values.shape).reshape(-1) for piece, bits in parts])
