"""Coefficients of the linear models, and how far off they are on shapes they never saw."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

from cost_models.fpga.families import FOLDER, FORMAT
from studies.fpga.calibrate import features_of, today

LUT_TERMS = (
    "adder_bits", "carry_bits", "product_bits", "offset_bits", "clamp_bits", "excess_bits",
)  # fmt: skip
FF_TERMS = ("registers", "adder_bits")
SMALLEST = 20.0  # a circuit below has no percentage worth stating
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
        print(what, tables[what])
        errors[what] = _report(rows, predicted, measured)
        if what == "ff":
            print("  counted alone:", _errors(design[:, 0], measured, ~is_fitted))
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


def _report(
    rows: Sequence[Row],
    predicted: NDArray[np.float64],
    measured: NDArray[np.float64],
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
        print(f"  {rows[at]['name']}: {predicted[at]:.0f} predicted, {measured[at]:.0f} measured")
    return _errors(predicted, measured, groups["held-out layers"])


def _errors(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], mask: NDArray[np.bool_]
) -> dict[str, float]:
    mask = mask & (measured >= SMALLEST)
    off = np.abs(predicted[mask] / measured[mask] - 1)
    rank = spearmanr(predicted[mask], measured[mask]).statistic if mask.sum() > 2 else np.nan
    return {
        "n": int(mask.sum()),
        "mean_error_percent": round(100 * float(off.mean()), 2),
        "largest_error_percent": round(100 * float(off.max()), 2),
        "rank_correlation": round(float(rank), 4),
    }
