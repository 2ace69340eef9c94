"""Whose kernels are measured: the contract of a backend, and the table of them."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cost_models.latency.table import Rule
from cost_models.latency.work import Call, Work
from quant_ops.errors import UsageError
from quant_ops.graph import Graph

BACKENDS: dict[str, str] = {
    "onnxruntime": "cost_models.latency.onnxruntime_backend:OnnxRuntime",
    "cuda": "cost_models.latency.cuda_backend:Cuda",
}


class Runner(ABC):
    """Something that can be run and timed.

    Attributes:
        share: of the time of one run that belongs to what is measured; the rest is spent on
            changes of layout at the ends, which a whole network does not have.
    """

    share: float = 1.0

    @abstractmethod
    def time_once(self) -> float:
        """Run once, to the end; microseconds."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a run costs beside its kernels, in microseconds: per run, and per kernel call."""

    per_run: float
    per_call: float


class Backend(ABC):
    """One runtime on the present machine.

    Attributes:
        name: as `--backend` calls it.
        rules: which kernel runs what on this device; the first that fits decides.
    """

    name: ClassVar[str]
    rules: tuple[Rule, ...]

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    @abstractmethod
    def device(self) -> dict[str, Any]:
        """Facts on the machine: "name", "fingerprint" and what the fingerprint is made of."""

    @abstractmethod
    def libraries(self) -> Mapping[str, str]:
        """Versions of what the kernels come from."""

    @abstractmethod
    def call(self, work: Work, kernel: str) -> Runner:
        """One call, ready to run."""

    @abstractmethod
    def empty(self, n_calls: int) -> Runner:
        """A network of calls that do next to nothing: what remains is overhead."""

    @abstractmethod
    def network(self, graph: Graph, calls: Sequence[Call]) -> Runner:
        """A whole network, ready to run; `calls` as `calls_of` gives them for `graph`."""


def find_backend(name: str) -> type[Backend]:
    """The backend called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}; known are {', '.join(BACKENDS)}")
    module, _, class_name = BACKENDS[name].partition(":")
    backend: type[Backend] = getattr(importlib.import_module(module), class_name)
    return backend
