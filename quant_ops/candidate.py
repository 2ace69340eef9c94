"""A candidate: the bit width of every searched weight and activation. Nothing about values."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Self

from quant_ops.bit_widths import BIT_WIDTHS, parse_bit_width

SCHEMES = ("auto", "mid_tread", "mid_rise", "affine")


@dataclass(frozen=True, slots=True)
class LayerQuant:
    """How one layer's weights are stored.

    Attributes:
        bit_widths: one entry for all output channels, or one per output channel.
        scheme: "mid_tread" (zero is a level), "mid_rise" (levels offset by half a step),
            "affine" (a zero point per channel), or "auto": whichever of the first two has the
            smaller error, chosen per layer and width.
        group_size: input weights per scale; None is one scale per output channel.
    """

    bit_widths: tuple[float, ...]
    scheme: str = "auto"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not self.bit_widths:
            raise ValueError("a layer needs at least one bit width")
        illegal = set(self.bit_widths) - set(BIT_WIDTHS)
        if illegal:
            raise ValueError(f"{sorted(illegal)} are not legal bit widths {BIT_WIDTHS}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme {self.scheme!r} is not one of {SCHEMES}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        if len(self.bit_widths) > 1 and len(set(self.bit_widths)) == 1:
            object.__setattr__(self, "bit_widths", self.bit_widths[:1])

    def per_channel(self, out_channels: int) -> tuple[float, ...]:
        """The bit width of each of `out_channels` output channels."""
        if len(self.bit_widths) == 1:
            return self.bit_widths * out_channels
        if len(self.bit_widths) != out_channels:
            raise ValueError(f"{len(self.bit_widths)} bit widths for {out_channels} channels")
        return self.bit_widths

    @property
    def uniform(self) -> float | None:
        """The one bit width of all channels, or None if they differ."""
        return self.bit_widths[0] if len(self.bit_widths) == 1 else None

    def to_text(self) -> str:
        """Compact spelling, run-length encoded.

        >>> LayerQuant((4, 4, 0, 8)).to_text(), LayerQuant((3,), scheme="affine").to_text()
        ('4x2,0,8', '3/affine')
        """
        runs = [(f"{width:g}", len(list(run))) for width, run in groupby(self.bit_widths)]
        text = ",".join(width if n == 1 else f"{width}x{n}" for width, n in runs)
        if self.scheme != "auto" or self.group_size is not None:
            text += f"/{self.scheme}"
        return text if self.group_size is None else f"{text}/{self.group_size}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Inverse of `to_text`."""
        widths, *rest = text.split("/")
        bit_widths: list[float] = []
        for run in widths.split(","):
            width, _, count = run.partition("x")
            bit_widths += [parse_bit_width(width)] * int(count or 1)
        scheme = rest[0] if rest else "auto"
        return cls(tuple(bit_widths), scheme, int(rest[1]) if len(rest) > 1 else None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Layer name to LayerQuant, and edge name to activation bit width, both in graph order.

    A layer that is missing stays float; an edge that is missing is not quantized. An edge is
    named after the node that produces it.
    """

    layers: tuple[tuple[str, LayerQuant], ...]
    activations: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls, layers: Mapping[str, LayerQuant | float], activations: Mapping[str, int] | None = None
    ) -> Self:
        """From mappings; a bare number is one width for the whole layer."""
        return cls(
            tuple(
                (name, quant if isinstance(quant, LayerQuant) else LayerQuant((quant,)))
                for name, quant in layers.items()
            ),
            tuple((activations or {}).items()),
        )

    @property
    def assignment(self) -> dict[str, LayerQuant]:
        """Layer name to LayerQuant."""
        return dict(self.layers)

    @property
    def activation_bits(self) -> dict[str, int]:
        """Edge name to activation bit width."""
        return dict(self.activations)

    def replace(self, changes: Mapping[str, LayerQuant | float]) -> "Candidate":
        """The same candidate with other widths for some layers, order kept."""
        layers: dict[str, LayerQuant | float] = {**self.assignment, **changes}
        return Candidate.of(layers, self.activation_bits)

    def to_json(self) -> dict[str, Any]:
        """A JSON value; equal candidates give equal values."""
        out: dict[str, Any] = {"layers": {name: quant.to_text() for name, quant in self.layers}}
        if self.activations:
            out["activations"] = dict(self.activations)
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(
            tuple((name, LayerQuant.from_text(text)) for name, text in value["layers"].items()),
            tuple(value.get("activations", {}).items()),
        )

    def digest(self) -> str:
        """Sixteen hexadecimal digits that identify the candidate across processes."""
        return _digest(self)

    def mean_weight_bits(self, weights_per_channel: Mapping[str, tuple[int, int]]) -> float:
        """Mean stored bits per weight.

        Args:
            weights_per_channel: layer name to (out_channels, weights of one channel).
        """
        total = bits = 0.0
        for name, quant in self.layers:
            out_channels, n = weights_per_channel[name]
            bits += n * sum(quant.per_channel(out_channels))
            total += n * out_channels
        return bits / total if total else 0.0


@lru_cache(maxsize=65536)
def _digest(candidate: Candidate) -> str:
    text = json.dumps(candidate.to_json(), separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def unique(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates without repetition, first occurrence kept."""
    return list(dict.fromkeys(candidates))
