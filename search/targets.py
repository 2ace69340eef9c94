"""What a deployment target can run: restricts the search space before the search."""

from dataclasses import dataclass

from quant_ops.bit_widths import BIT_WIDTHS
from quant_ops.errors import UsageError
from quant_ops.graph import Layer

NARROW = tuple(range(2, 9))


@dataclass(frozen=True, slots=True)
class TargetCapabilities:
    """Legal choices of one target.

    Attributes:
        name: for `--target`.
        summary: one line for the user.
        weight_bits: layer kind to legal weight widths; "*" stands for every other kind.
        activation_bits: legal activation widths; empty: activations may stay float.
        granularity: finest unit that may have a width of its own.
        removes_channels: whether width 0 is allowed.
        usual_activation_bits: what is searched where `--activation-bits` is not given.
        integer_only: operators without an integer form cannot run there.
        exporter: which exporter's refusals hold for it; empty: none.
    """

    name: str
    summary: str
    weight_bits: dict[str, tuple[float, ...]]
    activation_bits: tuple[int, ...] = ()
    granularity: str = "channel"
    removes_channels: bool = True
    usual_activation_bits: tuple[int, ...] = ()
    integer_only: bool = False
    exporter: str = ""

    def widths_for(self, layer: Layer) -> tuple[float, ...]:
        """Legal widths of one layer, ascending."""
        return self.weight_bits.get(layer.kind, self.weight_bits["*"])


TARGETS: dict[str, TargetCapabilities] = {
    target.name: target
    for target in (
        TargetCapabilities(
            "packed", "the packed file and its runtime: every width", {"*": BIT_WIDTHS}
        ),
        TargetCapabilities(
            "int8",
            "integer runtimes with 8-bit kernels only: 8-bit weights and activations",
            {"*": (0, 8)},
            activation_bits=(8,),
        ),
        TargetCapabilities(
            "int4-int8",
            "GPUs with INT4 and INT8 kernels: 4 or 8 bits per layer, activations likewise",
            {"*": (0, 4, 8)},
            activation_bits=(4, 8),
            granularity="layer",
        ),
        TargetCapabilities(
            "matmul-nbits",
            "ONNX Runtime on CPU: 2, 4 or 8 bits for linear layers, 8 bits for convolutions",
            {"linear": (2, 4, 8), "*": (8,)},
            granularity="layer",
            removes_channels=False,
        ),
        TargetCapabilities(
            "onnx",
            "ONNX Runtime: every width is stored, activations of up to 8 bits run in integers",
            {"*": BIT_WIDTHS},
            activation_bits=NARROW,
            usual_activation_bits=(8,),
            exporter="onnx",
        ),
        TargetCapabilities(
            "c",
            "microcontrollers and other C compilers: integers only, every width",
            {"*": BIT_WIDTHS},
            activation_bits=NARROW,
            usual_activation_bits=(8,),
            integer_only=True,
            exporter="c",
        ),
        TargetCapabilities(
            "fpga",
            "unrolled logic: integers only, a width for every channel",
            {"*": BIT_WIDTHS},
            activation_bits=NARROW,
            integer_only=True,
            exporter="verilog",
        ),
        TargetCapabilities(
            "hls",
            "an hls4ml project: integers only, a width for every channel",
            {"*": BIT_WIDTHS},
            activation_bits=NARROW,
            integer_only=True,
            exporter="hls",
        ),
    )
}


def find_target(name: str) -> TargetCapabilities:
    """The target called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; known are {', '.join(TARGETS)}")
    return TARGETS[name]
