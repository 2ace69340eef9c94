"""torch's and torchao's kernels on a CUDA device, timed as captured graphs between two events."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from cost_models.latency.backend import Backend, Runner
from cost_models.latency.cuda_device import find_device, rules_for
from cost_models.latency.cuda_kernels import Run, build
from cost_models.latency.work import Call, Work
from quant_ops.graph import Graph

log = logging.getLogger(f"bitfront.{__name__}")

_cuda: Any = torch.cuda  # parts of it carry no types
WARM_UP = 3  # runs before the capture, in which libraries choose their kernels


class Cuda(Backend):
    """What torch does on a GPU without a compiler: kernels of cuBLAS, cuDNN and torchao.

    Every call is captured as a CUDA graph, so that its time is the device's and not Python's. No
    cache is cleared: calls are timed in walks through a whole network (`measure.py`), so that
    weights come from where they lie in one.
    """

    name: ClassVar[str] = "cuda"

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads)
        self._device = find_device()
        self.rules = rules_for(self._device)
        self._pool: Any = None

    def device(self) -> dict[str, Any]:
        found = self._device
        facts = {
            "gpu": found.name,
            "capability": ".".join(map(str, found.capability)),
            "multiprocessors": found.multiprocessors,
            "memory_bytes": found.memory_bytes,
            "driver": found.driver,
            "cuda": found.cuda,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{found.name} (compute capability {facts['capability']}, CUDA {found.cuda})"
        return {"name": name, "fingerprint": digest, **facts}

    def libraries(self) -> Mapping[str, str]:
        out = {"torch": str(torch.__version__)}
        if self._device.torchao:
            return {**out, "torchao": self._device.torchao}
        log.warning(
            "torchao is not installed: kernels for weights alone are left out of the table; "
            "pip install 'bitfront[gpu]' adds them"
        )
        return out

    def call(self, work: Work, kernel: str) -> Runner:
        return self._captured([build(work, kernel, self._device)])

    def empty(self, n_calls: int) -> Runner:
        value = torch.zeros(1, device=self._device.place)
        return self._captured([value.sin_] * n_calls)

    def network(self, graph: Graph, calls: Sequence[Call]) -> Runner:
        """All calls in one captured graph, each on values of its own.

        One call does not read what another wrote, which changes no kernel and no order.
        """
        return self._captured([build(c.work, c.kernel, self._device) for c in calls if c.kernel])

    def _captured(self, runs: Sequence[Run]) -> Runner:
        if self._pool is None:  # results are never read, so all graphs may share their memory
            self._pool = torch.cuda.graph_pool_handle()
        return Captured(runs, self._pool)


class Captured(Runner):
    """Functions in turn as one CUDA graph; their launches cost the host nothing any more."""

    def __init__(self, runs: Sequence[Run], pool: Any) -> None:
        self._runs = list(runs)  # keeps alive what the graph reads
        stream = _cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        fastest = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with torch.no_grad(), fastest:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._run()
        self._start, self._end = (_cuda.Event(enable_timing=True) for _ in range(2))

    def _run(self) -> None:
        for run in self._runs:
            run()

    def time_once(self) -> float:
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return 1e3 * float(self._start.elapsed_time(self._end))
