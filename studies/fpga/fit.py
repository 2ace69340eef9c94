"""Coefficients of the linear models, and how far off they are on shapes they never saw."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

from cost_models.fpga.circuit import Circuit, Features, total
from cost_models.fpga.families import FOLDER, FORMAT
from studies.fpga.calibrate import features_of, today, unpack

LUT_TERMS = (
    "adder_bits", "carry_bits", "product_bits", "offset_bits", "clamp_bits", "excess_bits",
)  # fmt: skip
FF_TERMS = ("register_bits", "adder_bits", "rescale_register_bits", "code_register_bits")
SMALL = 100.0  # LUTs or registers below which errors count as of this many

Row = Mapping[str, str]


def fit(family: str, rows: Sequence[Row]) -> None:
    """Fit on the rows of the fitted shapes, print held-out errors, write the family's table."""
    features = [features_of(row) for row in rows]
    is_fitted = np.array([row["split"] == "fitted" for row in rows])
    tables: dict[str, dict[str, float]] = {}
    errors: dict[str, Any] = {}
    for what, terms in (("lut", LUT_TERMS), ("ff", FF_TERMS)):
        measured = np.array([float(row[what]) for row in rows])
        design = np.array([[float(getattr(f, term)) for term in terms] for f in features])
        weight = 1 / np.maximum(measured, SMALL)
        factors, _ = nnls((design * weight[:, None])[is_fitted], (measured * weight)[is_fitted])
        tables[what] = {term: round(float(f), 5) for term, f in zip(terms, factors, strict=True)}
        predicted = design @ factors
        trimmed = {
            row["name"]: _weighted(
                tables[what], total([c.features for c in without_dead(unpack(row["circuits"]))])
            )
            for row in rows
            if row["kind"] == "network"
        }
        print(what, tables[what])
        errors[what] = _report(rows, predicted, measured, trimmed)
        other = np.array([float(row[f"da4ml_{what}"]) for row in rows])
        print("  da4ml itself:", {k: v for k, v in _errors(other, measured, ~is_fitted).items()})
    stages = np.array([float(row["stages"]) for row in rows])
    cycles = np.array([-(-f.depth // 2) for f in features])
    print(
        "stages - cycles: mean", (stages - cycles).mean(), "largest", np.abs(stages - cycles).max()
    )
    facts = {
        "source": f"yosys {rows[0]['yosys']} synth_xilinx -family {family}, Verilog of da4ml "
        f"{rows[0]['da4ml']}; studies/fpga/{family}.csv",
        "date": today(),
        "rows": {"fitted": int(is_fitted.sum()), "held_out": int((~is_fitted).sum())},
        "held_out": errors,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = {"format": FORMAT, "version": 1, "family": family, **tables, "facts": facts}
    (FOLDER / f"{family}.json").write_text(json.dumps(table, indent=1) + "\n")


def without_dead(circuits: Sequence[Circuit]) -> list[Circuit]:
    """A chain of layers without outputs that are constant, or that nobody reads.

    yosys leaves those out of a whole network. The fitted model looks at one layer at a time and
    counts them: what this takes off is the share of its error that no coefficient can mend.
    """
    weights = [circuit.weights.copy() for circuit in circuits]
    for at, circuit in enumerate(circuits[:-1]):
        for row, (rescale, low, high) in enumerate(
            zip(circuit.rescales, *circuit.ranges, strict=True)
        ):
            first, last = rescale(np.array([int(low), int(high)]))
            if first == last:
                weights[at + 1][:, row] = 0
    for at in range(len(circuits) - 2, -1, -1):
        weights[at][~(weights[at + 1] != 0).any(axis=0)] = 0
    out = []
    for circuit, own in zip(circuits, weights, strict=True):
        kept = own.any(axis=1)
        rescales = tuple(r for r, keep in zip(circuit.rescales, kept, strict=False) if keep)
        out.append(Circuit(own[kept], circuit.low, circuit.high, rescales))
    return out


def _report(
    rows: Sequence[Row],
    predicted: NDArray[np.float64],
    measured: NDArray[np.float64],
    trimmed: Mapping[str, float],
) -> dict[str, Any]:
    kinds = np.array([row["kind"] for row in rows])
    fitted = np.array([row["split"] == "fitted" for row in rows])
    layers = np.isin(kinds, ["layer", "rescaled"])
    groups = {"fitted shapes": fitted, "held-out layers": layers & ~fitted}
    groups |= {kind: (kinds == kind) & ~fitted for kind in dict.fromkeys(kinds)}
    for name, mask in groups.items():
        if mask.any():
            print(f"  {name}:", _errors(predicted, measured, mask))
    for at in np.flatnonzero(kinds == "network"):
        name = rows[at]["name"]
        print(
            f"  {name}: {predicted[at]:.0f} predicted, {trimmed[name]:.0f} without dead outputs, "
            f"{measured[at]:.0f} measured"
        )
    return _errors(predicted, measured, groups["held-out layers"])


def _errors(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], mask: NDArray[np.bool_]
) -> dict[str, float]:
    off = np.abs(predicted[mask] / np.maximum(measured[mask], 1) - 1)
    rank = spearmanr(predicted[mask], measured[mask]).statistic if mask.sum() > 2 else np.nan
    return {
        "n": int(mask.sum()),
        "mean_error_percent": round(100 * float(off.mean()), 2),
        "largest_error_percent": round(100 * float(off.max()), 2),
        "rank_correlation": round(float(rank), 4),
    }


def _weighted(factors: Mapping[str, float], features: Features) -> float:
    return sum(factor * float(getattr(features, name)) for name, factor in factors.items())
