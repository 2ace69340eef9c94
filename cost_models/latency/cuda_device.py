"""A CUDA device: its facts, and which of torch's and torchao's kernels run what on it."""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from cost_models.latency.table import Rule
from cost_models.latency.work import Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.errors import EnvironmentFault

DATA = ("add", "copy", "max_pool", "average_pool", "mean", "layout")
INT_MM, BFLOAT16, FP8 = (7, 5), (8, 0), (8, 9)  # least compute capability
GROUP_SIZE = 128  # weights that share a scale in the 4-bit kernel
# what the numbers of rows, inputs and outputs must be multiples of; _int_mm also wants over 16 rows
ALIGNMENT = {"int8": (8, 8, 8), "fp8": (1, 16, 16), "weight4": (1, GROUP_SIZE, 1)}
LEAST_ROWS = {"int8": 32}


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A CUDA device and what is installed for it.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, major and minor.
        multiprocessors, memory_bytes: of this device, or of its slice.
        driver, cuda: versions.
        torchao: version, "" where it is not installed.
        place: torch's name of the device.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    driver: str
    cuda: str
    torchao: str
    place: str = "cuda"

    @property
    def half(self) -> torch.dtype:
        """The 16-bit float that its weight-only kernels work with."""
        return torch.bfloat16 if self.capability >= BFLOAT16 else torch.float16


def find_device() -> CudaDevice:
    """The present CUDA device.

    Raises:
        EnvironmentFault: there is none that torch can use.
    """
    if not torch.cuda.is_available():
        missing = (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
            if torch.version.cuda is None
            else "torch finds no GPU (nvidia-smi shows what the driver sees)"
        )
        raise EnvironmentFault(
            f"the backend cuda needs an NVIDIA GPU and a CUDA build of torch: {missing}"
        )
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return CudaDevice(
        name=found.name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        driver=driver_version(Path("/proc/driver/nvidia/version")),
        cuda=str(torch.version.cuda),
        torchao=metadata.version("torchao") if find_spec("torchao") else "",
    )


def driver_version(path: Path) -> str:
    """The version that the driver's own file names; "" where there is none."""
    words = path.read_text().splitlines()[0].split() if path.is_file() else []
    return next((w for w in words if w[:1].isdigit() and "." in w), "")


def rules_for(device: CudaDevice) -> tuple[Rule, ...]:
    """Which kernel runs what on such a device; the first that fits decides."""
    rules = []
    if device.capability >= FP8:
        # their floats have 4 significant bits: 4-bit codes and halves of them are exact
        rules.append(Rule("fp8", ("linear",), 4, 4, "torch._scaled_mm on codes as float8_e4m3fn"))
    half = "no integer kernel: codes are computed on in half precision"
    if device.capability >= INT_MM:
        rules += [
            Rule("int8", ("linear",), 8, 8, "torch._int_mm, padded; rescaling is not fused"),
            Rule("int8", ("conv",), 8, 8, f"1x1: torch._int_mm; others: {half}"),
        ]
    else:
        rules.append(Rule("int8", ("linear", "conv"), 8, 8, half))
    widened = "no kernel for weights alone: widened to half precision"
    note = widened
    if device.torchao:
        if device.capability >= BFLOAT16:
            note4 = f"torchao Int4WeightOnlyConfig, groups of {GROUP_SIZE}; bfloat16 inputs"
            rules.append(Rule("weight4", ("linear",), 4, FLOAT_BITS, note4))
        note8 = "torchao Int8WeightOnlyConfig; without a compiler weights are cast at every call"
        rules.append(Rule("weight8", ("linear",), 8, FLOAT_BITS, note8))
    else:
        note = f"torchao is not installed, {widened}"
    return (
        *rules,
        Rule("float16", ("linear",), 16, FLOAT_BITS, note),
        Rule("float16", ("conv",), 16, FLOAT_BITS, widened),
        Rule("float32", ("conv", "linear"), FLOAT_BITS, FLOAT_BITS, "TF32 off"),
        Rule("int8", ("quantize", "dequantize", *DATA), FLOAT_BITS, 8, "on codes"),
        Rule("float32", DATA, FLOAT_BITS, FLOAT_BITS, "on floats"),
    )


def as_matmul(work: Work) -> tuple[int, int, int] | None:
    """Rows, inputs and outputs of a call that is a matrix product; None where it is not.

    >>> as_matmul(Work("linear", (784, 128, 1)))
    (1, 784, 128)
    """
    if work.operator == "linear":
        n_in, n_out, rows = work.dims
        return rows, n_in, n_out
    if work.operator != "conv" or work.attribute("groups") != (1,):
        return None
    plain = {name: set(work.attribute(name)) for name in ("kernel", "stride", "pads")}
    if plain != {"kernel": {1}, "stride": {1}, "pads": {0}}:
        return None
    n_in, n_out, height, width = work.dims
    return height * width, n_in, n_out


def padded(kernel: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The rows, inputs and outputs that a kernel computes for those asked for.

    >>> padded("int8", (1, 100, 10))
    (32, 104, 16)
    """
    multiples = ALIGNMENT.get(kernel, (1, 1, 1))
    rows, n_in, n_out = (-(-n // m) * m for n, m in zip(shape, multiples, strict=True))
    return max(rows, LEAST_ROWS.get(kernel, 1)), n_in, n_out
