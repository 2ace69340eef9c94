"""The circuits that are synthesized: layers of twelve shapes, and whole networks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from cost_models.fpga.circuit import Circuit, accumulator_ranges
from cost_models.fpga.rescaling import Fixed, cheapest

FITTED = ((8, 8), (16, 10), (12, 24), (32, 8), (27, 6), (20, 16))
HELD_OUT = ((10, 12), (24, 10), (9, 16), (16, 16), (40, 6), (64, 5))  # no row of these is fitted
LAYERS_PER_SHAPE = 6
EARLY_LAYERS = 2
NETWORKS = ((16, 16, 10), (16, 20, 12, 5), (64, 12, 10))
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
ZEROS = (0.0, 0.25, 0.5, 0.7, 0.9)
INPUT_BITS = (3, 4, 6, 8)
_SHIFT = 40

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Circuits that follow each other, synthesized as one.

    Attributes:
        name: unique.
        kind: "layer", "rescaled" (with a quantizer behind), "network" or "position" (of a
            convolution).
        split: "fitted" or "held-out".
        source: "random" or "trained" weights.
        weight_bits, input_bits, zeros: of the first layer.
        circuits: in order.
    """

    name: str
    kind: str
    split: str
    source: str
    weight_bits: int
    input_bits: int
    zeros: float
    circuits: tuple[Circuit, ...]


def cases() -> Iterator[Case]:
    """Every case: fitted and held-out shapes in turn, then networks, then the other held-out ones.

    The last are layers of the fitted shapes that only make the coefficients steadier.
    """
    for number in range(LAYERS_PER_SHAPE):
        for fitted, held_out in zip(FITTED, HELD_OUT, strict=True):
            if number < EARLY_LAYERS:
                yield _layer(fitted, number, "fitted")
            yield _layer(held_out, number, "held-out")
        if number == EARLY_LAYERS - 1:
            yield from _networks()
    for number in range(EARLY_LAYERS, LAYERS_PER_SHAPE):
        yield from (_layer(shape, number, "fitted") for shape in FITTED)


def _layer(shape: tuple[int, int], number: int, split: str) -> Case:
    """Settings go through their lists at different paces, so that they do not move together."""
    n_inputs, n_outputs = shape
    seed = 1000 * n_inputs + 10 * n_outputs + number
    rng = np.random.default_rng(seed)
    weight_bits = WEIGHT_BITS[(number + n_inputs) % len(WEIGHT_BITS)]
    zeros = ZEROS[(2 * number + n_outputs) % len(ZEROS)]
    input_bits = int(rng.choice(INPUT_BITS))
    source = ("random", "trained")[(number + n_outputs // 2) % 2]
    if source == "trained":
        weights = trained_weights((n_inputs, n_outputs, 10), seed)[0]
        codes = quantized(weights, weight_bits, zeros)
    else:
        limit = 2 ** (weight_bits - 1) - 1
        codes = rng.integers(-limit, limit + 1, (n_outputs, n_inputs))
        codes[rng.random(codes.shape) < zeros] = 0
    signed = bool(rng.random() < 0.3)
    low = -(2 ** (input_bits - 1)) if signed else 0
    rescaled = number % 3 != 0
    rescales = rescales_for(codes, low, low + 2**input_bits - 1, rng) if rescaled else ()
    return Case(
        f"{n_inputs}x{n_outputs}-{number}",
        "rescaled" if rescaled else "layer",
        split,
        source,
        weight_bits,
        input_bits,
        zeros,
        (Circuit(codes.astype(np.int64), low, low + 2**input_bits - 1, rescales),),
    )


def _networks() -> Iterator[Case]:
    for number, sizes in enumerate(NETWORKS):
        rng = np.random.default_rng(number)
        bits, zeros, input_bits = (3, 4, 4)[number], (0.5, 0.3, 0.6)[number], (6, 4, 4)[number]
        yield Case(
            f"network-{'-'.join(map(str, sizes))}", "network", "held-out", "trained",
            bits, input_bits, zeros,
            chain(trained_weights(sizes, number), bits, zeros, input_bits, rng),
        )  # fmt: skip
    rng = np.random.default_rng(9)
    for channels, outputs in ((1, 6), (6, 8)):  # 3x3 kernels at one position
        weights = rng.normal(size=(outputs, 9 * channels))
        yield Case(
            f"position-3x3x{channels}-{outputs}", "position", "held-out", "random", 4, 6, 0.3,
            chain([weights], 4, 0.3, 6, rng, leaves=False),
        )  # fmt: skip


def chain(
    layers: list[Floats],
    weight_bits: int,
    zeros: float,
    input_bits: int,
    rng: np.random.Generator,
    *,
    leaves: bool = True,
) -> tuple[Circuit, ...]:
    """Layers with ReLU between; the accumulators of the last leave the circuit."""
    circuits = []
    high = 2**input_bits - 1
    for at, weights in enumerate(layers):
        codes = quantized(weights, weight_bits, zeros)
        last = leaves and at == len(layers) - 1
        rescales = () if last else rescales_for(codes, 0, high, rng, code_bits=4)
        circuits.append(Circuit(codes, 0, high, rescales))
        high = 15
    return tuple(circuits)


def quantized(weights: Floats, weight_bits: int, zeros: float) -> NDArray[np.int64]:
    """Codes per output channel, the smallest weights of each left out."""
    kept = weights.copy()
    if zeros:
        kept[np.abs(kept) < np.quantile(np.abs(kept), zeros)] = 0
    limit = max(2 ** (weight_bits - 1) - 1, 1)
    scale = np.abs(kept).max(axis=1, keepdims=True) / limit
    return np.rint(kept / np.where(scale > 0, scale, 1)).astype(np.int64)


def rescales_for(
    codes: NDArray[np.int64],
    low: int,
    high: int,
    rng: np.random.Generator,
    *,
    code_bits: int | None = None,
) -> tuple[Fixed, ...]:
    """A quantizer per output: ReLU or signed, a real scale or a power of two, biased, clamping."""
    bits = int(rng.integers(2, 9)) if code_bits is None else code_bits
    signed = code_bits is None and bool(rng.random() < 0.3)
    is_power = code_bits is None and bool(rng.random() < 0.4)
    lowest = -(2 ** (bits - 1)) if signed else 0
    out = []
    for below, above in zip(*accumulator_ranges(codes, low, high), strict=True):
        reach = max(-int(below), int(above), 1)
        ratio = float(rng.uniform(1.5, 3)) * 2**bits / reach
        if is_power:
            ratio = 2.0 ** np.round(np.log2(ratio))
        bias = float(rng.normal()) * 0.1 * 2**bits
        offset = round(bias * 2**_SHIFT) + 2 ** (_SHIFT - 1)
        exact = Fixed(round(ratio * 2**_SHIFT), offset, _SHIFT, lowest, lowest + 2**bits - 1)
        out.append(cheapest(exact, int(below), int(above)))
    return tuple(out)


def trained_weights(sizes: tuple[int, ...], seed: int) -> list[Floats]:
    """Weights of a ReLU network on scikit-learn's digits, mixed at random to `sizes[0]` inputs."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    mix = rng.random((pixels.shape[1], sizes[0])) * (rng.random((pixels.shape[1], sizes[0])) < 0.2)
    x = torch.from_numpy((pixels / 16 @ mix).astype(np.float32))
    y = torch.from_numpy(labels.astype(np.int64))
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    head = nn.Linear(sizes[-1], 10) if sizes[-1] != 10 else nn.Identity()
    steps = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1], head)
    optimizer = torch.optim.Adam(steps.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        functional.cross_entropy(steps(x), y).backward()
        optimizer.step()
    return [layer.weight.detach().double().numpy() for layer in layers]
