"""ONNX Runtime's CPU kernels: float32, int8 and weight-only 8, 4 and 2 bits."""

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cost_models.latency.backend import Backend, Runner
from cost_models.latency.table import Rule
from cost_models.latency.work import Call, Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.errors import EnvironmentFault
from quant_ops.graph import Graph

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    from cost_models.latency.onnx_timing import HELPER, IR_VERSION, OPSET, network, single_call
except ImportError as error:  # there is no wheel for every machine
    raise EnvironmentFault(
        f"the backend onnxruntime needs the packages onnx and onnxruntime ({error}); install them "
        f"with pip install onnx onnxruntime"
    ) from error

_runtime: Any = onnxruntime  # carries no types
_DATA = ("add", "copy", "max_pool", "average_pool", "mean", "layout")
_LAYOUT_NODES = frozenset({"ReorderInput", "ReorderOutput", "Transpose"})
_HAS_OWN_LAYOUT = frozenset({"conv", "layout"})
PROFILED_RUNS = 60
_ISA = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


class OnnxRuntime(Backend):
    """What ONNX Runtime does on a CPU, one thread unless told otherwise.

    A convolution has kernels for float32 and int8 only, so narrower weights are widened: to int8
    where the input is quantized, to float at load where it is not. A linear layer on float inputs
    has MatMulNBits with 2, 4 and 8 bits, on quantized inputs int8.
    """

    name: ClassVar[str] = "onnxruntime"
    rules: tuple[Rule, ...] = (
        Rule("int8", ("conv",), 8, 8, "QLinearConv; narrower weights and inputs are widened"),
        Rule("int8", ("linear",), 8, 8, "QGemm; narrower weights and inputs are widened"),
        Rule("weight2", ("linear",), 2, FLOAT_BITS, "MatMulNBits, accuracy level 4"),
        Rule("weight4", ("linear",), 4, FLOAT_BITS, "MatMulNBits; 3 bits are widened"),
        Rule("weight8", ("linear",), 8, FLOAT_BITS, "MatMulNBits; 5 to 7 bits are widened"),
        Rule("float32", ("conv",), FLOAT_BITS, FLOAT_BITS, "no kernel for weights alone: widened"),
        Rule("float32", ("linear",), FLOAT_BITS, FLOAT_BITS, "Gemm"),
        Rule("int8", ("quantize", "dequantize", *_DATA), FLOAT_BITS, 8, "on codes"),
        Rule("float32", _DATA, FLOAT_BITS, FLOAT_BITS, "on floats"),
    )

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads)
        self._shares: dict[tuple[Work, str], float] = {}

    def device(self) -> dict[str, Any]:
        info = _cpu_info()
        facts = {
            "cpu": info.get("model name") or platform.processor() or platform.machine(),
            "vendor": info.get("vendor_id", ""),
            "family": info.get("cpu family", ""),
            "model": info.get("model", ""),
            "instructions": [flag for flag in _ISA if flag in info.get("flags", "").split()],
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": self.threads,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        family = f" (family {facts['family']}, model {facts['model']})" if facts["family"] else ""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        name = f"{facts['cpu']}{family}, {threads}"
        return {"name": name, "fingerprint": digest, **facts, "cores": os.cpu_count()}

    def libraries(self) -> Mapping[str, str]:
        return {name: metadata.version(name) for name in ("onnxruntime", "onnx", "numpy")}

    def call(self, work: Work, kernel: str) -> Runner:
        content = single_call(work, kernel)
        share = 1.0
        if work.operator in _HAS_OWN_LAYOUT:
            share = self._share(work, kernel, content)
        return _Session(content, self.threads, share)

    def empty(self, n_calls: int) -> Runner:
        return _Session(_chain(n_calls), self.threads)

    def network(self, graph: Graph, calls: Sequence[Call]) -> Runner:
        return _Session(network(graph, calls), self.threads)

    def _share(self, work: Work, kernel: str, content: bytes) -> float:
        """Share of a probe's time that is its own, see `Runner`."""
        if (work, kernel) not in self._shares:
            times = self._profile(content)
            around = sum(t for name, (op, t) in times.items() if _is_around(name, op))
            share = around / max(sum(t for _, t in times.values()), 1e-9)
            # what is timed for a change of layout goes in and out: two of them
            share = share / 2 if work.operator == "layout" else 1 - share
            self._shares[work, kernel] = max(share, 1e-3)
        return self._shares[work, kernel]

    def _profile(self, content: bytes) -> dict[str, tuple[str, float]]:
        """Node name to operator and microseconds by the runtime's own clock, less what it costs."""
        raw = _profiled(content, self.threads)
        return {name: (op, max(t - self._profiling_us, 0.1)) for name, (op, t) in raw.items()}

    @cached_property
    def _profiling_us(self) -> float:
        """What the runtime's clock shows for a call that does next to nothing."""
        return float(np.median([t for _, t in _profiled(_chain(9), self.threads).values()]))


def _is_around(name: str, op: str) -> bool:
    return op in _LAYOUT_NODES or name.startswith(HELPER)


def _profiled(content: bytes, threads: int) -> dict[str, tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        session = _Session(content, threads, profile=Path(folder) / "profile")
        for _ in range(PROFILED_RUNS):
            session.time_once()
        events = json.loads(Path(session.end_profile()).read_text())
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"])
            kinds[event["name"]] = event["args"]["op_name"]
    # the clock shows whole microseconds: the mean of the faster half resolves more
    return {n: (kinds[n], float(np.mean(sorted(t)[: len(t) // 2]))) for n, t in times.items()}


class _Session(Runner):
    """A model in memory with its inputs bound, so that a run is little more than its kernels."""

    def __init__(
        self, content: bytes, threads: int, share: float = 1.0, *, profile: Path | None = None
    ) -> None:
        options = _runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._session: Any = _runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self.share = share
        self._binding: Any = self._session.io_binding()
        rng = np.random.default_rng(0)
        for value in self._session.get_inputs():
            array = (
                rng.integers(0, 256, value.shape).astype(np.uint8)
                if value.type == "tensor(uint8)"
                else rng.standard_normal(value.shape, np.float32)
            )
            self._binding.bind_ortvalue_input(
                value.name, _runtime.OrtValue.ortvalue_from_numpy(array)
            )
        for value in self._session.get_outputs():
            self._binding.bind_output(value.name, "cpu")

    def time_once(self) -> float:
        started = time.perf_counter_ns()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter_ns() - started) / 1e3

    def end_profile(self) -> str:
        """Stop profiling; the file written."""
        return str(self._session.end_profiling())


def _chain(n_calls: int) -> bytes:
    names = ["x", *(f"v{i}" for i in range(1, n_calls)), "y"]
    nodes = [helper.make_node("Sin", [a], [b]) for a, b in pairwise(names)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "empty", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
