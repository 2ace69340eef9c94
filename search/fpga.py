"""`search fpga`: finalists as circuits, counted by da4ml and yosys; facts beside the trials."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cost_models.fpga.adders import ADDERS_PER_STAGE
from cost_models.fpga.assembly import assembled
from cost_models.fpga.circuit import Features
from cost_models.fpga.costs import Cycles
from cost_models.fpga.families import DEFAULT, Family, family
from cost_models.fpga.network import Part, by_step, parts_of_model
from cost_models.fpga.synthesis import agrees, pipelined, require_tools, synthesize, traced
from quant_ops.errors import UsageError, VerificationError
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from search.config import read_config
from search.front import ParetoFront
from search.record import Record
from search.show import read_front

FACT = "fpga"  # beside a trial: what was measured of its circuit
FINALISTS = 3
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One trial's circuit, position by position.

    Attributes:
        trial: its number.
        family: of the FPGA.
        lut_fitted, ff_fitted: from the fitted model, of the packed file's own codes.
        lut_da4ml: adder bits of da4ml, a cost of its own kind.
        lut, ff: cells of yosys, each convolution's position times its positions; registers between
            parts once.
        cycles: stages of da4ml's pipelines, one part after the other.
        cycles_analytic: two adders per stage.
        parts: names of the parts that were synthesized.
        estimated: parts without weights (maxima, sums of tensors); theirs are fitted.
        seconds: of yosys.
    """

    trial: int
    family: str
    lut_fitted: int
    ff_fitted: int
    lut_da4ml: int
    lut: int
    ff: int
    cycles: int
    cycles_analytic: int
    parts: tuple[str, ...]
    estimated: tuple[str, ...]
    seconds: float


def measure_finalists(
    folder: Path, trials: Sequence[int] = (), *, tell: Told = lambda text: None
) -> list[Measured]:
    """Synthesize trials of a finished run; what was measured before is read from the record.

    Args:
        folder: of the run.
        trials: numbers of packed points; by default the last `FINALISTS` of the front that fit.
        tell: told of each part before it is synthesized.

    Raises:
        UsageError: no such trial, or a network that cannot be a circuit.
        EnvironmentFault: yosys or da4ml is absent, or takes too long.
        VerificationError: da4ml's circuit computes something else.
    """
    config, _ = read_config(folder)
    of = family(config.fpga or DEFAULT)
    front = read_front(folder)
    record = Record.open(folder, storage=config.storage)
    known = known_measurements(record, of.name)
    out = []
    for trial in trials or _finalists(front):
        if trial not in known:
            require_tools()
            model = PackedModel.load(_packed_file(folder, front, trial)).model
            known[trial] = _measure(trial, model, of, tell)
            record.add_fact(trial, FACT, asdict(known[trial]))
        out.append(known[trial])
    return out


def known_measurements(record: Record, name: str) -> dict[int, Measured]:
    """Trial to what was measured of it for a family."""
    facts = record.facts(FACT).items()
    return {trial: _from_fact(fact) for trial, fact in facts if fact["family"] == name}


def _from_fact(fact: dict[str, Any]) -> Measured:
    lists = {key: tuple(fact[key]) for key in ("parts", "estimated")}
    return Measured(**{**fact, **lists})


def _finalists(front: ParetoFront) -> list[int]:
    packed = [e.trial for e in front.points if e.trial in front.packed]
    return packed[-FINALISTS:]


def _packed_file(folder: Path, front: ParetoFront, trial: int) -> Path:
    if trial not in front.packed:
        raise UsageError(
            f"{folder} has no packed file of trial {trial}; those of the front have one: "
            f"{', '.join(map(str, sorted(front.packed)))}"
        )
    return folder / front.packed[trial]


def _measure(trial: int, model: QuantizedModel, of: Family, tell: Told) -> Measured:
    parts = parts_of_model(model)
    steps = by_step(parts)
    whole = assembled(model.graph, steps)
    luts, ffs = 0, _between(parts, whole)
    adders = seconds = 0.0
    for part in parts:
        if part.kept is None:
            luts, ffs = luts + round(of.luts(part.features)), ffs + of.registers(part.features)
            continue
        tell(f"trial {trial}: {part.name}")
        logic = traced([part.kept])
        if not agrees(logic, [part.kept]):
            raise VerificationError(f"da4ml's circuit of {part.name} computes something else")
        pipeline, cost = pipelined(logic)
        cells = synthesize(pipeline, of.name)
        luts, ffs = luts + part.copies * cells.lut, ffs + part.copies * cells.ff
        adders, seconds = adders + part.copies * cost.lut, seconds + cells.seconds
        steps[part.name] = replace(steps[part.name], depth=ADDERS_PER_STAGE * cost.stages)
    return Measured(
        trial=trial,
        family=of.name,
        lut_fitted=round(of.luts(whole)),
        ff_fitted=round(of.registers(whole)),
        lut_da4ml=round(adders),
        lut=luts,
        ff=round(ffs),
        cycles=int(Cycles().of_features(assembled(model.graph, steps), of)),
        cycles_analytic=int(Cycles().of_features(whole, of)),
        parts=tuple(part.name for part in parts if part.circuit is not None),
        estimated=tuple(part.name for part in parts if part.circuit is None),
        seconds=round(seconds, 1),
    )


def _between(parts: Sequence[Part], whole: Features) -> float:
    """Registers that a network has beyond its parts, which were synthesized each for itself.

    Codes wait for others. Against that, codes that one part registers at its end are those that
    the next registers as they come in, and positions share their inputs.
    """
    alone = Features()
    for part in parts:
        own = part.other if part.kept is None else part.kept.features.times(part.copies)
        alone = alone.beside(own)
    held = whole.code_register_bits - alone.code_register_bits
    return held + whole.input_bits - alone.input_bits + whole.end_bits - alone.end_bits


def fpga_rows(front: ParetoFront, folder: Path) -> tuple[list[Measured], str]:
    """Measurements of a run's trials and its family; nothing where no FPGA was asked for."""
    config, _ = read_config(folder)
    if not any("lut" in e.costs for e in front.points):
        return [], ""
    name = config.fpga or DEFAULT
    record = Record.open(folder, storage=config.storage)
    return list(known_measurements(record, name).values()), name


def print_fpga(front: ParetoFront, folder: Path, console: Console) -> None:
    """Resources of every point, fitted or analytic, and what was measured of some."""
    rows, name = fpga_rows(front, folder)
    if not name:
        return
    measured = {row.trial: row for row in rows}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{name}, fully unrolled")
    table.title_justify = "left"
    table.add_column("trial", justify="right")
    for title in ("LUT fitted", "FF fitted", "DSP analytic", "BRAM analytic", "cycles analytic"):
        table.add_column(title, justify="right")
    if measured:
        for title in ("LUT yosys", "FF yosys", "cycles da4ml"):
            table.add_column(title, justify="right")
    for e in front.points:
        costs = [f"{e.costs[key]:,.0f}" for key in ("lut", "ff", "dsp", "bram", "cycles")]
        row = measured.get(e.trial)
        found = ["-"] * 3 if row is None else [f"{n:,}" for n in (row.lut, row.ff, row.cycles)]
        table.add_row(str(e.trial), *costs, *(found if measured else ()))
    console.print(table)
    console.print(_accuracy(family(name)), style="dim", soft_wrap=True, highlight=False)


def _accuracy(of: Family) -> str:
    held_out = of.facts.get("held_out", {}).get("lut", {})
    if not held_out:
        return "the fitted model carries no held-out error"
    return (
        f"fitted to {of.facts['source']}: LUT off by {held_out['mean_error_percent']:.1f} % in the "
        f"mean on {held_out['n']} layers of other shapes; `search fpga RUN` measures finalists. "
        f"None of these is a place-and-route figure"
    )


def print_measured(rows: Sequence[Measured], console: Console) -> None:
    """What was measured beside what was fitted."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (
        "trial", "LUT yosys", "LUT fitted", "off by", "FF yosys", "FF fitted", "LUT da4ml",
        "cycles da4ml", "seconds",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        off = 100 * (row.lut_fitted / max(row.lut, 1) - 1)
        table.add_row(
            str(row.trial), f"{row.lut:,}", f"{row.lut_fitted:,}", f"{off:+.1f} %", f"{row.ff:,}",
            f"{row.ff_fitted:,}", f"{row.lut_da4ml:,}", str(row.cycles), f"{row.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
