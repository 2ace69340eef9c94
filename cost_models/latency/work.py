"""What a device is asked to do: one fused call of a kernel, and its size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_ops.errors import VerificationError

DIMS: dict[str, tuple[str, ...]] = {
    "conv": ("in_channels", "out_channels", "height", "width"),
    "linear": ("in_features", "out_features", "rows"),
    "max_pool": ("channels", "height", "width"),
    "average_pool": ("channels", "height", "width"),
    "mean": ("channels", "height", "width"),
    "add": ("elements",),
    "copy": ("elements", "run"),
    "quantize": ("elements",),
    "dequantize": ("elements",),
    "layout": ("elements",),
    "view": (),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "conv": ("kernel", "stride", "pads", "dilation", "groups", "add"),
    "max_pool": ("kernel", "stride", "pads"),
    "average_pool": ("kernel", "stride", "pads"),
}
DEPTHWISE = 0  # of `groups`: as many as there are channels
Attribute = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """One fused call: a convolution with its activation and addition, a copy, a change of type.

    Attributes:
        operator: a key of `DIMS`.
        dims: sizes by which a latency may be interpolated, named in `DIMS`. Of a convolution the
            size of its input; elements are those of the result, of which a copy moves `run` at
            once because they lie side by side.
        attributes: values that must be those of a measured call, named in `ATTRIBUTES`: kernel,
            stride, padding (before all axes, then after), dilation, groups (0: one per channel),
            add (1: another value is added to the result).
    """

    operator: str
    dims: tuple[int, ...]
    attributes: tuple[Attribute, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What `dims` are called."""
        return DIMS[self.operator]

    def attribute(self, name: str) -> Attribute:
        """The attribute called `name`."""
        return self.attributes[ATTRIBUTES[self.operator].index(name)]

    def dim(self, name: str) -> int:
        """The size called `name`."""
        return self.dims[DIMS[self.operator].index(name)]

    def with_dims(self, **dims: int) -> "Work":
        """The same call at another size."""
        names = DIMS[self.operator]
        new = tuple(dims.get(name, old) for name, old in zip(names, self.dims, strict=True))
        return Work(self.operator, new, self.attributes)

    @property
    def groups(self) -> int:
        """Groups of a convolution, as a number."""
        (groups,) = self.attribute("groups")
        return self.dim("out_channels") if groups == DEPTHWISE else groups

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of what a convolution or a pool gives."""
        kernel, stride, pads = (self.attribute(n) for n in ("kernel", "stride", "pads"))
        dilation = self.attribute("dilation") if self.operator == "conv" else (1, 1)
        size = (self.dim("height"), self.dim("width"))
        height, width = (
            (size[a] + pads[a] + pads[a + 2] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
            for a in (0, 1)
        )
        return height, width

    @property
    def adds(self) -> bool:
        """Whether it is a convolution to whose result another value is added."""
        return self.operator == "conv" and self.attribute("add") == (1,)

    def without_addition(self) -> "Work":
        """The convolution alone."""
        return Work(self.operator, self.dims, (*self.attributes[:-1], (0,)))

    @property
    def n_weights(self) -> int:
        """Weights that the call reads."""
        if self.operator == "linear":
            return self.dims[0] * self.dims[1]
        if self.operator != "conv":
            return 0
        return math.prod(self.attribute("kernel")) * self.dims[0] * self.dims[1] // self.groups

    def describe(self) -> str:
        """A few words: operator, sizes, what is special.

        >>> Work("linear", (784, 128, 1)).describe()
        'linear 784 -> 128'
        """
        if self.operator == "linear":
            rows = "" if self.dim("rows") == 1 else f" x {self.dim('rows')}"
            return f"linear {self.dims[0]} -> {self.dims[1]}{rows}"
        if self.operator != "conv":
            return f"{self.operator} of {' x '.join(map(str, self.dims))}"
        kernel, stride, (groups,) = (self.attribute(n) for n in ("kernel", "stride", "groups"))
        in_channels, out_channels, height, width = self.dims
        parts = [f"{kernel[0]}x{kernel[1]} convolution {in_channels} -> {out_channels}"]
        parts += [f"at {height}x{width}"]
        parts += [f"stride {stride[0]}"] if max(stride) > 1 else []
        parts += ["depthwise" if groups == DEPTHWISE else f"{groups} groups"] if groups != 1 else []
        parts += ["with addition"] if self.adds else []
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """A JSON value, see LATENCY_TABLE.md."""
        out: dict[str, Any] = {
            "operator": self.operator,
            "shape": dict(zip(DIMS[self.operator], self.dims, strict=True)),
        }
        if self.attributes:
            names = ATTRIBUTES[self.operator]
            out["attributes"] = {
                n: v[0] if len(v) == 1 else list(v)
                for n, v in zip(names, self.attributes, strict=True)
            }
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Work":
        """Inverse of `to_json`.

        Raises:
            VerificationError: not a call that the format knows.
        """
        operator = str(value.get("operator"))
        if operator not in DIMS:
            raise VerificationError(f"operator {operator!r} is none of {', '.join(DIMS)}")
        names = ATTRIBUTES.get(operator, ())
        try:
            dims = tuple(int(value["shape"][name]) for name in DIMS[operator])
            given = value.get("attributes", {})
            attributes = tuple(
                tuple(int(n) for n in v) if isinstance(v := given[name], list) else (int(v),)
                for name in names
            )
        except (KeyError, TypeError, ValueError) as error:
            wanted = ", ".join((*DIMS[operator], *names))
            raise VerificationError(
                f"an entry of operator {operator!r} needs whole numbers for {wanted}: {error!r} "
                f"in {dict(value)}"
            ) from error
        return cls(operator, dims, attributes)


@dataclass(frozen=True, slots=True)
class Call:
    """A call in a network.

    Attributes:
        work: what is computed.
        kernel: which kernel of the device does it, see `LatencyTable.kernel_for`.
        inputs: names of the values read.
        output: name of the value written.
        node: index of the graph's node that it comes from.
        relu: whether a clamp is part of it.
        is_implicit: inserted by the device's own runtime, not written into its model files.
        to_float: a call on codes that gives floats.
        layer: name of the layer that it computes, "" for none.
    """

    work: Work
    kernel: str
    inputs: tuple[str, ...]
    output: str
    node: int
    relu: bool = False
    is_implicit: bool = False
    to_float: bool = False
    layer: str = ""


def conv_macs(work: Work, block: int = 1) -> int:
    """Multiply-accumulates of a convolution, channels rounded up to a multiple of `block`."""
    height, width = work.out_size
    in_channels, out_channels = (-(-c // block) * block for c in work.dims[:2])
    per_group = max(1, in_channels // work.groups) if work.groups > 1 else in_channels
    return math.prod(work.attribute("kernel")) * per_group * out_channels * height * width
