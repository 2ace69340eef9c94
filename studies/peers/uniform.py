"""One width for all layers, a symmetric scale per output channel: what every toolkit can do."""

import copy

import torch
from network import Bench, PeerNetwork, PeerWeight
from torch import Tensor

WIDTHS = range(8, 0, -1)
SHARES = torch.linspace(0.2, 1.0, 81)  # of the largest magnitude: where a channel may be clipped


def uniform_nearest(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """Scales from the largest magnitude, rounding to nearest."""
    return _uniform(bench, size, torch.ones(1))


def uniform_mse(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """Scales of least squared error of the channel's weights, rounding to nearest."""
    return _uniform(bench, size, SHARES)


def _uniform(bench: Bench, size: int, shares: Tensor) -> PeerNetwork | None:
    """The widest uniform width that fits; None where none does. One bit is {-s, 0}: left out."""
    room = bench.weight_bytes(size)
    bit_width = next((b for b in WIDTHS if bench.n_weights * b / 8 <= room), None)
    if bit_width is None or bit_width < 2:
        return None
    model = copy.deepcopy(bench.task.model)
    weights = {}
    for name in bench.layers:
        layer = model.get_submodule(name)
        layer.weight.data = quantized(layer.weight.data, bit_width, shares)
        weights[name] = PeerWeight(layer.weight.data, bit_width)
    return PeerNetwork(model, weights)


def quantized(weight: Tensor, bit_width: int, shares: Tensor) -> Tensor:
    """Codes -2^(b-1) .. 2^(b-1)-1, dequantized; the best of the clip limits per channel.

    weight: (out_channels, ...); shares: (n,), clip limits as shares of the largest magnitude.
    """
    rows = weight.flatten(1)
    low, high = -(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1
    largest = rows.abs().amax(dim=1, keepdim=True)
    # The scale of torch's own symmetric observer: the range is spread over all codes.
    scales = largest * shares * 2 / (high - low)
    best, least = rows, torch.full_like(largest, torch.inf)
    for scale in scales.clamp_min(torch.finfo(rows.dtype).tiny).unbind(dim=1):
        tried = (rows / scale[:, None]).round().clamp(low, high) * scale[:, None]
        error = (tried - rows).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best.reshape(weight.shape)
