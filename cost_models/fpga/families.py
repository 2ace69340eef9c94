"""Fitted coefficients, one file per FPGA family in `cost_models/tables/fpga`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cost_models.fpga.circuit import Features
from quant_ops.errors import UsageError

FOLDER = Path(__file__).parent.parent / "tables" / "fpga"
DEFAULT = "xc7"
FORMAT = "bitfront-fpga"


@dataclass(frozen=True)
class Family:
    """Linear models of LUTs and registers, and how far off they were.

    Attributes:
        name: as yosys calls the family.
        lut, ff: feature name to coefficient.
        facts: source, date, versions and held-out errors, as the calibration wrote them.
    """

    name: str
    lut: Mapping[str, float]
    ff: Mapping[str, float]
    facts: Mapping[str, Any]

    def luts(self, features: Features) -> float:
        """Look-up tables of a circuit."""
        return _weighted(self.lut, features)

    def registers(self, features: Features) -> float:
        """Flip-flops of a pipelined circuit."""
        return _weighted(self.ff, features)


def _weighted(coefficients: Mapping[str, float], features: Features) -> float:
    terms = (factor * float(getattr(features, name)) for name, factor in coefficients.items())
    return sum(terms)


def family_names() -> list[str]:
    """Families with a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def family(name: str) -> Family:
    """The fitted model of a family.

    Raises:
        UsageError: there is none.
    """
    path = FOLDER / f"{name}.json"
    if name not in family_names():
        raise UsageError(
            f"there is no fitted model of the FPGA family {name!r}; known are "
            f"{', '.join(family_names())}, and `python -m studies.fpga.calibrate` makes others"
        )
    content = json.loads(path.read_text())
    return Family(name, content["lut"], content["ff"], content["facts"])
