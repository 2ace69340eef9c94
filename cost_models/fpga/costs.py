"""LUTs, registers, DSPs, memories and cycles of a fully unrolled, pipelined circuit."""

import math
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from cost_models.base import CostModel, Kind
from cost_models.fpga.adders import ADDERS_PER_STAGE
from cost_models.fpga.assembly import assembled
from cost_models.fpga.circuit import Features
from cost_models.fpga.families import DEFAULT, Family, family
from cost_models.fpga.network import Unrolled, by_step, parts_of_model
from quant_ops.bank import WeightBank
from quant_ops.candidate import Candidate
from quant_ops.graph import Graph
from quant_ops.quantized import QuantizedModel

SETTING = "fpga"  # the family, among the settings that cost models are bound with
_UNROLLED: "weakref.WeakKeyDictionary[WeightBank, Unrolled]" = weakref.WeakKeyDictionary()


class FpgaCost(CostModel):
    """A cost of the circuit in which every weight has adders of its own.

    It needs codes: `bound` gives the model of one network. Each costs what the integer program of
    REQUANTIZATION.md takes, with multipliers as short as the same codes allow; a network's outputs
    leave as accumulators. All costs of one bank share what they know of its layers.
    """

    unit: ClassVar[str] = ""

    def __init__(self, unrolled: Unrolled | None = None, of: Family | None = None) -> None:
        self._unrolled, self._family = unrolled, of

    def bound(self, bank: WeightBank, settings: Mapping[str, str]) -> CostModel:
        unrolled = _UNROLLED.setdefault(bank, Unrolled(bank))
        return type(self)(unrolled, family(settings.get(SETTING, DEFAULT)))

    def cost(self, graph: Graph, candidate: Candidate) -> float:
        """Of the bank's network.

        Raises:
            UsageError: the network cannot be a circuit; says why.
        """
        if self._unrolled is None or self._family is None:
            raise ValueError(f"{self.name} needs weights: bind it to a WeightBank first")
        return self.of_features(self._unrolled.features(candidate), self._family)

    def cost_of(self, model: QuantizedModel) -> float:
        """Of a model's own codes.

        Raises:
            UsageError: the network cannot be a circuit; says why.
        """
        if self._family is None:
            raise ValueError(f"{self.name} needs a family: bind it first")
        features = assembled(model.graph, by_step(parts_of_model(model)))
        return self.of_features(features, self._family)

    @abstractmethod
    def of_features(self, features: Features, of: Family) -> float:
        """The cost of a circuit with these features."""


class LUT(FpgaCost):
    """Look-up tables, fitted to yosys `synth_xilinx`; not a place-and-route figure."""

    name: ClassVar[str] = "lut"
    budget_key: ClassVar[str] = "lut"
    kind: ClassVar[Kind] = "fitted"

    def of_features(self, features: Features, of: Family) -> float:
        return round(of.luts(features))


class FF(FpgaCost):
    """Registers with one stage per two adders in a row, fitted to yosys."""

    name: ClassVar[str] = "ff"
    budget_key: ClassVar[str] = "ff"
    kind: ClassVar[Kind] = "fitted"

    def of_features(self, features: Features, of: Family) -> float:
        return round(of.registers(features))


class DSP(FpgaCost):
    """Multipliers: none, since constants become adders. See `reuse` for shared multipliers."""

    name: ClassVar[str] = "dsp"
    budget_key: ClassVar[str] = "dsp"
    kind: ClassVar[Kind] = "analytic"

    def of_features(self, features: Features, of: Family) -> float:
        return 0.0


class BRAM(FpgaCost):
    """Block memories: none, since weights are wires. See `reuse` for shared multipliers."""

    name: ClassVar[str] = "bram"
    budget_key: ClassVar[str] = "bram"
    kind: ClassVar[Kind] = "analytic"

    def of_features(self, features: Features, of: Family) -> float:
        return 0.0


class Cycles(FpgaCost):
    """Stages from input to output at one new sample per cycle: two adders in a row per stage."""

    name: ClassVar[str] = "cycles"
    budget_key: ClassVar[str] = "cycles"
    kind: ClassVar[Kind] = "analytic"

    def of_features(self, features: Features, of: Family) -> float:
        return float(math.ceil(features.depth / ADDERS_PER_STAGE))
