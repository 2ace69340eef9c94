"""The contract of an exporter: say what cannot be done, write, run what was written."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from quant_ops.errors import UsageError
from quant_ops.packed import PackedModel
from search.budget import format_size
from search.task import Preprocessing
from search.vectors import TINY, Vectors, run_packed

Outputs: TypeAlias = Sequence[Tensor]
Runner: TypeAlias = Callable[[Sequence[Tensor]], Outputs]

LISTED = 8  # files of an artefact that a report names


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a target cannot express: which operator or layer, why, and the nearest thing it can."""

    where: str
    reason: str
    instead: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.instead}"


@dataclass(frozen=True, slots=True)
class Promise:
    """How near an artefact must come to what its target should compute.

    Attributes:
        tolerance: largest difference of any output, over the largest output; 0: equal bit for bit.
        text: what equals the referee and what is only close, in one sentence.
    """

    tolerance: float
    text: str


@dataclass(frozen=True)
class Companions:
    """What travels with every artefact.

    Attributes:
        vectors: real inputs (up to 32 samples) and the outputs of the referee.
        class_names, preprocessing: as the task states them.
        origin: what it was made from: task, trial.
        assignment: the widths, by the layers' own names (`Candidate.to_json`).
    """

    vectors: Vectors
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    origin: Mapping[str, str | int] = field(default_factory=dict)
    assignment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was written, and how it was proven.

    Attributes:
        target: name of the exporter.
        path: the file or folder.
        files: file name to its size in bytes.
        largest_difference: of any output from the referee's, over the referee's largest magnitude.
        facts: more findings, in the order in which they are printed.
        snippet: Python or shell that loads and runs the artefact.
    """

    target: str
    path: Path
    files: Mapping[str, int]
    largest_difference: float
    facts: Mapping[str, Any]
    snippet: str

    def with_facts(self, facts: Mapping[str, Any]) -> "Report":
        """The same report with more findings."""
        return replace(self, facts={**self.facts, **facts})

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "file": str(self.path),
            "target": self.target,
            "files": dict(self.files),
            "largest_difference": self.largest_difference,
            **self.facts,
            "load": self.snippet,
        }

    def to_text(self) -> str:
        """A few lines, the last ones how to load the artefact."""
        sizes = list_files(self.files)
        difference = self.largest_difference
        said = f"{difference:.2g} of the largest output away from" if difference else "equal to"
        lines = [
            f"{self.path}: {self.target}",
            f"  files: {sizes}",
            f"  outputs: {said} the reference's",
        ]
        lines += [f"  {key.replace('_', ' ')}: {value}" for key, value in self.facts.items()]
        lines.append("  load it:")
        return "\n".join(lines + [f"    {line}" for line in self.snippet.splitlines()])


class Exporter(ABC):
    """One deployment target; it holds settings and no other state.

    `delivery.deliver` calls, in this order: `refusals` (nothing is written if there are any),
    `write`, `open`, then the runner it gave on test vectors and validation inputs. `search verify`
    calls `open` again later, on any machine. `path` is a folder that exists and holds what `write`
    put there, or, with `is_file`, the artefact's one file.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for the user
    exactness: ClassVar[str]  # one sentence: what equals the referee, what is only close
    is_file: ClassVar[bool] = False
    needs_integers: ClassVar[bool] = False  # activations must be quantized
    is_simulated: ClassVar[bool] = False  # what runs is a simulator: its time says nothing
    tolerance: ClassVar[float] = 0.0  # allowed difference from `expected`; 0: equal bit for bit

    def in_arithmetic(self, arithmetic: str) -> "Exporter":
        """This target with another arithmetic of its integer steps.

        Raises:
            UsageError: it has only one, or none of that name.
        """
        raise UsageError(
            f"--arithmetic is for --to onnx; target {self.name!r} computes in one way only"
        )

    @abstractmethod
    def refusals(self, packed: PackedModel) -> Sequence[Refusal]:
        """Everything that this target cannot express; empty if it can express the model."""

    @abstractmethod
    def write(self, packed: PackedModel, path: Path, companions: Companions) -> None:
        """Write the artefact's own files; test vectors and the manifest are added by others."""

    @abstractmethod
    def open(self, path: Path) -> Runner:
        """A function that runs what lies there: inputs, batch first, to flat outputs.

        Raises:
            VerificationError: damaged or hostile files, in one sentence.
            EnvironmentFault: a tool or library is missing here.
        """

    @abstractmethod
    def snippet(self, path: Path) -> str:
        """A few lines that load it and run it on its test vectors, as they stand."""

    def expected(self, packed: PackedModel, inputs: Sequence[Tensor]) -> Outputs:
        """What the artefact must compute: the referee, or this target's mode of it."""
        return run_packed(packed, tuple(inputs))

    def promise(self, packed: PackedModel) -> Promise:
        """How near this model's artefact must come to `expected`."""
        return Promise(self.tolerance, self.exactness)

    def facts(self, packed: PackedModel, path: Path, inputs: Sequence[Tensor]) -> Mapping[str, Any]:
        """More for the report; `inputs` are those of the test vectors."""
        return {}

    def float_runner(self, packed: PackedModel) -> tuple[str, Runner] | None:
        """The same network in float32 on this target, and its name, to compare times with.

        None: the float model in torch.
        """
        return None


def require_expressible(exporter: Exporter, packed: PackedModel) -> None:
    """Raise `UsageError` with every refusal, before anything is written."""
    refusals = exporter.refusals(packed)
    if refusals:
        said = "\n  ".join(str(refusal) for refusal in refusals)
        raise UsageError(f"target {exporter.name!r} cannot express this model:\n  {said}")


def list_files(files: Mapping[str, int]) -> str:
    """Names and sizes, the largest of many.

    >>> list_files({"a": 12, "b": 3})
    'a 12 B, b 3 B'
    """
    largest = sorted(files, key=lambda name: -files[name])[:LISTED]
    said = ", ".join(f"{name} {format_size(files[name])}" for name in files if name in largest)
    more = len(files) - len(largest)
    if not more:
        return said
    return f"{said} and {more} smaller ones, {format_size(sum(files.values()))} in all"


def relative_difference(mine: Outputs, wanted: Outputs) -> float:
    """Largest |mine - wanted| of any output over its largest |wanted|; inf if shapes differ."""
    if [x.shape for x in mine] != [x.shape for x in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(mine, wanted, strict=True):
        if not torch.equal(a, b):
            distance = float((a.double() - b.double()).abs().max())
            ratio = distance / max(float(b.double().abs().max()), TINY)
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst
