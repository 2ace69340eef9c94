"""Which layers run on the x86 kernels, and what they need of the arena."""

from dataclasses import dataclass

from search.exporters.c.network import Conv, Network

LANES = 16
LANES_BYTES = 4 * 4 * LANES + 2 * 8 * LANES  # constants behind the weights of 16 channels
SLACK = 64  # bytes that a kernel may read behind the source
_OUTPUTS = {"uint8": 0, "int8": 1, "int32": 2}


@dataclass(frozen=True, slots=True)
class FastConv:
    """A layer repacked for dot products of four bytes, 16 output channels side by side.

    Attributes:
        numbers: initializer of its descriptor in C, in the order of the fields.
        n_bytes: of the repacked weights and constants.
        padded_bytes: of the copy of the source, 0 if there is none.
    """

    numbers: tuple[int, ...]
    n_bytes: int
    padded_bytes: int

    def literal(self) -> str:
        """Initializer of its descriptor in C."""
        return ", ".join(str(n) for n in self.numbers)


def plan_fast(network: Network) -> dict[int, FastConv]:
    """Operation number to the plan of each layer that fits the kernels."""
    out = {}
    for index, operation in enumerate(network.operations):
        if isinstance(operation, Conv) and _fits(operation):
            out[index] = _plan(operation)
    return out


def _fits(conv: Conv) -> bool:
    """8-bit activations, 32-bit sums, no depth; groups of at least four channels."""
    per_group = conv.channels // conv.groups
    return (
        conv.source.type in ("uint8", "int8")
        and conv.target.type in _OUTPUTS
        and conv.bits == 32
        and conv.sizes[0] == conv.out_sizes[0] == conv.kernel[0] == 1
        and conv.padding[0] == 0
        and max(conv.spread) == 1
        and min(conv.padding) >= 0
        and (conv.groups == 1 or per_group >= 4)
    )


def _plan(conv: Conv) -> FastConv:
    _, in_h, in_w = conv.sizes
    _, out_h, out_w = conv.out_sizes
    _, kernel_h, kernel_w = conv.kernel
    _, stride_h, stride_w = conv.stride
    _, dilation_h, dilation_w = conv.dilation
    _, top, left = conv.padding
    reach_h = (out_h - 1) * stride_h + (kernel_h - 1) * dilation_h + 1
    reach_w = (out_w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1
    padded_h, padded_w = max(reach_h, top + in_h), max(reach_w, left + in_w)
    per_group = conv.channels // conv.groups
    merges = conv.groups == 1 and dilation_w == 1  # the taps of a kernel row lie side by side
    per_line = 1 if merges else kernel_w
    length = per_group * (kernel_w if merges else 1)
    runs = kernel_h * per_line
    flip = 128 if conv.source.type == "int8" else 0
    copies = bool(flip) or (padded_h, padded_w) != (in_h, in_w) or length % 4 > 0
    out_per_group = conv.out_channels // conv.groups
    bundles = -(-out_per_group // LANES) * conv.groups
    n_bytes = bundles * (runs * -(-length // 4) * 64 + LANES_BYTES)
    rescale = conv.rescale
    numbers = (
        in_h, in_w, conv.channels, out_h, out_w, conv.out_channels, conv.groups,
        kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w,
        top, left, padded_h, padded_w,
        runs, per_line, length, flip, conv.source.codes.zero_point + flip,
        _OUTPUTS[conv.target.type], rescale.zero_point, rescale.low, rescale.high,
        int(not conv.rows.fits_int8), int(copies),
    )  # fmt: skip
    padded = padded_h * padded_w * conv.channels + SLACK if copies else 0
    return FastConv(numbers, n_bytes, padded)
