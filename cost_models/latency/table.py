"""A latency table: which kernel a device uses for what, and how long it takes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.latency.roofline import Roofline
from cost_models.latency.work import Work
from quant_ops.bit_widths import FLOAT_BITS
from quant_ops.errors import UsageError, VerificationError

FORMAT = "bitfront-latency-table"
VERSION = 1
UNITS = ("us", "relative")


@dataclass(frozen=True, slots=True)
class Rule:
    """A kernel and what runs on it.

    Attributes:
        kernel: its name in the entries.
        operators: what it computes.
        weight_bits: the widest weights it takes; narrower ones are widened to it.
        activation_bits: the widest inputs it takes; 32: floats.
        note: a few words for people.
    """

    kernel: str
    operators: tuple[str, ...]
    weight_bits: int
    activation_bits: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A measured call.

    Attributes:
        work: what was computed.
        kernel: by which kernel.
        rounds: least time of each round of measuring, in the table's unit.
        layer: "" or the one layer of a published network that the entry is of.
        resident_bytes: weights that were read in turn with the call's own: those of a network
            that fits into a cache are read faster. 0 where that does not matter or is not known.
    """

    work: Work
    kernel: str
    rounds: tuple[float, ...]
    layer: str = ""
    resident_bytes: int = 0

    @property
    def time(self) -> float:
        """The least time, in the table's unit."""
        return min(self.rounds)

    @property
    def spread(self) -> float:
        """How far the median round lies above the least, as a share of it."""
        return float(np.median(self.rounds)) / self.time - 1 if self.time > 0 else 0.0


@dataclass(frozen=True)
class LatencyTable:
    """What a file of the format says; LATENCY_TABLE.md explains every field.

    Attributes:
        name: of the table.
        device: facts on the machine; "name" and "fingerprint" at least.
        source: where the numbers are from, a sentence.
        date: ISO date of the measurement or publication.
        backend: whose kernels they are.
        unit: "us", or "relative": of use as ratios only.
        batch: samples that one call works on.
        rules: in order; the first that fits decides.
        entries: measured calls.
        call_overhead: of one call of a whole network, in the table's unit.
        libraries: name to version.
        complete: false while the measurement goes on.
        conditions: other facts, such as how busy the machine was.
    """

    name: str
    device: Mapping[str, Any]
    source: str
    date: str
    backend: str
    unit: str
    rules: tuple[Rule, ...]
    entries: tuple[Entry, ...]
    batch: int = 1
    call_overhead: float = 0.0
    libraries: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def kernel_for(self, operator: str, weight_bits: int, activation_bits: int) -> str:
        """The kernel that runs an operator at these widths; "" where the table leaves it out.

        Raises:
            UsageError: the table has the operator, but no kernel so wide.
        """
        known = False
        for rule in self.rules:
            if operator not in rule.operators:
                continue
            known = True
            if weight_bits <= rule.weight_bits and activation_bits <= rule.activation_bits:
                return rule.kernel
        if known and operator in ("conv", "linear"):
            widths = ", ".join(
                f"{r.kernel} (weights up to {r.weight_bits}, activations up to {r.activation_bits})"
                for r in self.rules
                if operator in r.operators
            )
            raise UsageError(
                f"latency table {self.name!r} has no kernel for {operator} with "
                f"{_bits(weight_bits)} weights and {_bits(activation_bits)} activations, only "
                f"{widths}; allow those widths alone with --bits and --activation-bits, or use "
                f"another table"
            )
        return ""

    def time(
        self,
        work: Work,
        kernel: str,
        layer: str = "",
        *,
        resident_bytes: float = 0,
        extrapolate: bool = False,
    ) -> float:
        """Time of a call, measured where this very call was, else from the fitted roofline.

        Args:
            work: what is computed.
            kernel: as `kernel_for` gives it; "" costs nothing.
            layer: name of the layer; an entry of that layer alone wins over others of its shape.
            resident_bytes: weights of the whole network.
            extrapolate: allow sizes outside the measured range.

        Raises:
            UsageError: nothing of the kind was measured, or not at such sizes.
        """
        if not kernel:
            return 0.0
        own = self._by_layer.get((work, kernel, layer)) if layer else None
        if own is not None:
            return own
        fit = self.fits.get((work.operator, work.attributes, kernel))
        if fit is None and work.adds:  # a table of convolutions alone leaves additions out
            return self.time(
                work.without_addition(),
                kernel,
                layer,
                resident_bytes=resident_bytes,
                extrapolate=extrapolate,
            )
        if fit is None:
            raise UsageError(
                f"latency table {self.name!r} ({self.device['name']}) has no entry of kernel "
                f"{kernel!r} for a {work.describe()}; measure it: search profile --task T --out "
                f"FILE, or use another table"
            )
        outside = fit.outside(work)
        if outside and not extrapolate:
            raise UsageError(
                f"latency table {self.name!r} ({self.device['name']}) does not reach a "
                f"{work.describe()} of kernel {kernel!r}: {outside}; measure it with search "
                f"profile, or allow a guess with --extrapolate"
            )
        return fit.predict(work, resident_bytes)

    def weight_bytes(self, work: Work, kernel: str) -> float:
        """Bytes of the weights of a call, as the kernel keeps them."""
        return work.n_weights * self._kernel_bits.get((kernel, work.operator), 0) / 8

    @cached_property
    def _kernel_bits(self) -> dict[tuple[str, str], int]:
        return {(r.kernel, op): r.weight_bits for r in self.rules for op in r.operators}

    @property
    def milliseconds(self) -> float:
        """Milliseconds of one unit; 1 where the unit is relative."""
        return 1e-3 if self.unit == "us" else 1.0

    @cached_property
    def fits(self) -> dict[tuple[str, tuple[tuple[int, ...], ...], str], Roofline]:
        """(operator, attributes, kernel) to its roofline."""
        groups: dict[tuple[str, tuple[tuple[int, ...], ...], str], list[Entry]] = {}
        for entry in self.entries:
            key = (entry.work.operator, entry.work.attributes, entry.kernel)
            groups.setdefault(key, []).append(entry)
        return {key: _fit(entries) for key, entries in groups.items()}

    @cached_property
    def _by_layer(self) -> dict[tuple[Work, str, str], float]:
        return {(e.work, e.kernel, e.layer): e.time for e in self.entries if e.layer}

    def to_json(self) -> dict[str, Any]:
        """The content of a file of the format."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "device": dict(self.device),
            "source": self.source,
            "date": self.date,
            "backend": self.backend,
            "libraries": dict(self.libraries),
            "unit": self.unit,
            "batch": self.batch,
            "call_overhead": self.call_overhead,
            "complete": self.complete,
            "conditions": dict(self.conditions),
            "kernels": [
                {
                    "kernel": r.kernel,
                    "operators": list(r.operators),
                    "weight_bits": r.weight_bits,
                    "activation_bits": r.activation_bits,
                    "note": r.note,
                }
                for r in self.rules
            ],
            "fits": [
                {
                    "operator": operator,
                    "attributes": [list(a) for a in attributes],
                    "kernel": kernel,
                    "entries": len(fit.works),
                    "median_error": _finite(fit.error[0]),
                    "p90_error": _finite(fit.error[1]),
                }
                for (operator, attributes, kernel), fit in (
                    self.fits.items() if self.complete else ()
                )
            ],
            "entries": [_entry_to_json(e) for e in self.entries],
        }

    def to_text(self) -> str:
        """The same as text, an entry per line."""
        content = self.to_json()
        entries = ",\n".join(f"  {json.dumps(e)}" for e in content.pop("entries"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        return f'{head},\n "entries": [\n{entries}\n ]\n}}\n'

    @classmethod
    def from_json(cls, value: Any, where: str) -> "LatencyTable":
        """Inverse of `to_json`; `where` names the file in messages.

        Raises:
            VerificationError: not a table, or one with wrong values.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise VerificationError(
                f'{where} is not a latency table (no "format": "{FORMAT}"); search profile '
                f"writes one"
            )
        if value.get("version") != VERSION:
            raise VerificationError(
                f"{where} is a latency table of version {value.get('version')!r}, this program "
                f"reads version {VERSION}"
            )
        try:
            rules = tuple(
                Rule(
                    str(r["kernel"]),
                    tuple(r["operators"]),
                    int(r["weight_bits"]),
                    int(r["activation_bits"]),
                    str(r.get("note", "")),
                )
                for r in value["kernels"]
            )
            entries = tuple(
                Entry(
                    Work.from_json(e),
                    str(e["kernel"]),
                    tuple(float(t) for t in e["rounds"]),
                    str(e.get("layer", "")),
                    int(e.get("resident_bytes", 0)),
                )
                for e in value["entries"]
            )
            table = cls(
                name=str(value["name"]),
                device=dict(value["device"]),
                source=str(value["source"]),
                date=str(value["date"]),
                backend=str(value["backend"]),
                unit=str(value["unit"]),
                rules=rules,
                entries=entries,
                batch=int(value.get("batch", 1)),
                call_overhead=float(value.get("call_overhead", 0.0)),
                libraries=dict(value.get("libraries", {})),
                complete=bool(value.get("complete", True)),
                conditions=dict(value.get("conditions", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationError(
                f"{where} is not a sound latency table: {type(error).__name__}: {error}; the "
                f"format is described in cost_models/LATENCY_TABLE.md"
            ) from error
        table._require_sound(where)
        return table

    def _require_sound(self, where: str) -> None:
        if self.unit not in UNITS:
            raise VerificationError(f"{where}: unit {self.unit!r} is none of {', '.join(UNITS)}")
        if not {"name", "fingerprint"} <= set(self.device):
            raise VerificationError(f"{where}: the device needs a name and a fingerprint")
        kernels = {rule.kernel for rule in self.rules}
        for entry in self.entries:
            if entry.kernel not in kernels:
                raise VerificationError(
                    f"{where}: kernel {entry.kernel!r} of an entry is not among the kernels"
                )
            if not entry.rounds or not all(t > 0 and math.isfinite(t) for t in entry.rounds):
                raise VerificationError(
                    f"{where}: the times of a {entry.work.describe()} must be positive numbers, "
                    f"got {list(entry.rounds)}"
                )


def load_table(path: Path) -> LatencyTable:
    """The table in a file.

    Raises:
        UsageError: there is no such file, or it is a measurement that was not finished.
        VerificationError: it is not a table.
    """
    table = read_table(path)
    if not table.complete:
        raise UsageError(
            f"the latency table {path} is not complete: its measurement was interrupted; go on "
            f"with the same search profile command and --out {path}"
        )
    return table


def read_table(path: Path) -> LatencyTable:
    """The table in a file, complete or not."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"there is no latency table {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VerificationError(f"{path} is not readable JSON: {error}") from error
    return LatencyTable.from_json(content, str(path))


def merged(rules: Sequence[Rule]) -> str:
    """The kernels in a few words, for lists."""
    return ", ".join(dict.fromkeys(rule.kernel for rule in rules))


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    out = {**entry.work.to_json(), "kernel": entry.kernel, "rounds": list(entry.rounds)}
    if entry.layer:
        out["layer"] = entry.layer
    if entry.resident_bytes:
        out["resident_bytes"] = entry.resident_bytes
    return out


def _fit(entries: Sequence[Entry]) -> Roofline:
    """A roofline; several layers of one shape in one published network count by their mean."""
    times: dict[tuple[Work, int], list[float]] = {}
    for entry in entries:
        times.setdefault((entry.work, entry.resident_bytes), []).append(entry.time)
    works = [work for work, _ in times]
    return Roofline.fit(works, [float(np.mean(t)) for t in times.values()], [b for _, b in times])


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _bits(width: int) -> str:
    return "float" if width == FLOAT_BITS else f"{width}-bit"
