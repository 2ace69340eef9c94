"""Which layers run on the x86 kernels, and what they need of the arena."""

from dataclasses import dataclass

from search.exporters.c.network import Conv, Network

LANES = 16
LANES_BYTES = 4 * 4 * LANES + 2 * 8 * LANES  # constants behind the weights of 16 channels
SLACK = 64  # bytes that a kernel may read behind the source
_SOURCES = ("uint8", "int8")
_TARGETS = (*_SOURCES, "int32")


@dataclass(frozen=True, slots=True)
class FastConv:
    """Memory of a layer whose weights are repacked: 16 output channels and four taps together.

    `bf_fast_of` in bitfront_x86.h computes the same sizes.

    Attributes:
        n_bytes: of the repacked weights and constants.
        padded_bytes: of the copy of the source, 0 if there is none.
    """

    n_bytes: int
    padded_bytes: int


def plan_fast(network: Network) -> dict[int, FastConv]:
    """Operation number to the plan of each layer that fits the kernels."""
    return {
        index: _plan(operation)
        for index, operation in enumerate(network.operations)
        if isinstance(operation, Conv) and _fits(operation)
    }


def _fits(conv: Conv) -> bool:
    """8-bit activations, 32-bit sums, no depth; groups of at least four channels."""
    per_group = conv.channels // conv.groups
    return (
        conv.source.type in _SOURCES
        and conv.target.type in _TARGETS
        and conv.bits == 32
        and conv.sizes[0] == conv.out_sizes[0] == conv.kernel[0] == 1
        and conv.padding[0] == 0
        and max(conv.spread) == 1
        and min(conv.padding) >= 0
        and (conv.groups == 1 or per_group >= 4)
    )


def _plan(conv: Conv) -> FastConv:
    merges = conv.groups == 1 and conv.dilation[2] == 1  # taps of a kernel row lie side by side
    runs = conv.kernel[1] * (1 if merges else conv.kernel[2])
    length = conv.channels // conv.groups * (conv.kernel[2] if merges else 1)
    bundles = -(-(conv.out_channels // conv.groups) // LANES) * conv.groups
    n_bytes = bundles * (runs * -(-length // 4) * 64 + LANES_BYTES)
    padded = [_padded(conv, axis) for axis in (1, 2)]
    copies = conv.source.type == "int8" or padded != list(conv.sizes[1:]) or length % 4 > 0
    return FastConv(n_bytes, padded[0] * padded[1] * conv.channels + SLACK if copies else 0)


def _padded(conv: Conv, axis: int) -> int:
    """Positions from the first that a window reads to the last, all of the source among them."""
    reach = (conv.out_sizes[axis] - 1) * conv.stride[axis] + 1
    reach += (conv.kernel[axis] - 1) * conv.dilation[axis]
    return max(reach, conv.padding[axis] + conv.sizes[axis])
