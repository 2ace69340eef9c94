"""Circuits compute the integers of the code-domain reference; costs follow from codes alone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.base import CostModel
from cost_models.fpga.assembly import assembled
from cost_models.fpga.circuit import Circuit
from cost_models.fpga.network import by_step, parts_of_model
from cost_models.fpga.quantizer import crossed
from cost_models.fpga.synthesis import agrees, missing_tools, pipelined, synthesize, traced
from cost_models.table import FPGA_COSTS, cost_model
from quant_ops.bank import WeightBank
from quant_ops.calibration import calibrate
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.errors import UsageError
from quant_ops.lowering import lower
from quant_ops.reference import run
from search.capture import trace
from search.exporters.unrolled import unroll


def bank_of(model: nn.Module, *shape: int) -> tuple[WeightBank, torch.Tensor]:
    inputs = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    traced_model = trace(model.eval(), (inputs[:2],))
    edges = {edge.name: edge.node for edge in activation_edges(traced_model.graph)}
    calibration = calibrate(
        traced_model.graph, traced_model.params, [((inputs,), None)], edges=edges
    )
    return WeightBank(traced_model.graph, traced_model.params, calibration), inputs


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def edges_at(bank: WeightBank, bit_width: int) -> dict[str, int]:
    inner = [e for e in activation_edges(bank.graph) if e.kind != "output"]
    return {e.name: 8 if e.kind == "input" else bit_width for e in inner}


@pytest.fixture(scope="module")
def bank() -> WeightBank:
    return bank_of(mlp(), 6)[0]


def candidate_of(bank: WeightBank, weights: int = 4, activations: int = 4) -> Candidate:
    layers = {layer.name: weights for layer in bank.graph.layers}
    return Candidate.of(layers, edges_at(bank, activations))


@pytest.mark.parametrize(("weights", "activations"), [(2, 3), (4, 4), (8, 8)])
def test_circuits_compute_the_reference(weights, activations):
    bank, inputs = bank_of(mlp(), 6)
    model = bank.quantize(candidate_of(bank, weights, activations))
    program = lower(model)
    names = list(program.edges)
    codes = run(program, (inputs.numpy(),), keep=names).codes
    value = codes[names[0]]
    parts = [part.circuit for part in parts_of_model(model)]
    for circuit, name in zip(parts, [*names[1:], None], strict=True):
        assert circuit is not None
        value = circuit.run(value)
        if name is not None:
            assert np.array_equal(value, codes[name])
    assert not parts[-1].rescales  # accumulators leave


def test_dead_inputs_take_no_adders(bank):
    layers = {layer.name: LayerQuant((4,)) for layer in bank.graph.layers}
    first, second, _ = bank.graph.layers
    layers[first.name] = LayerQuant((0, 0, 4, 4, 4, 4, 4, 4))
    model = bank.quantize(Candidate.of(layers, edges_at(bank, 4)))
    parts = {part.name: part.circuit for part in parts_of_model(model)}
    matrix = parts[bank.graph.nodes[second.sites[0]].name].weights
    assert not matrix[:, :2].any()
    assert matrix[:, 2:].any()


def test_costs_of_a_convolution_are_those_of_one_position_times_positions():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    bank, _ = bank_of(conv, 2, 8, 8)
    parts = parts_of_model(bank.quantize(candidate_of(bank)))
    first, maxima, last = parts
    assert (first.copies, last.copies) == (36, 1)
    assert first.features.adder_bits == 36 * first.circuit.features.adder_bits
    assert maxima.circuit is None
    assert maxima.features.clamp_bits == (4 * 36 - 4 * 9) * 4
    assert bound(bank)["lut"].cost(bank.graph, candidate_of(bank)) > 0


class Residual(nn.Module):
    """A block whose short way waits for three layers; its addition has two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.long = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.head(functional.relu(self.long(x) + x))


@pytest.fixture(scope="module")
def residual() -> WeightBank:
    torch.manual_seed(0)
    return bank_of(Residual(), 5)[0]


def test_an_addition_is_adders_and_a_clamp_at_the_widths_of_its_codes(residual):
    model = residual.quantize(candidate_of(residual))
    addition = next(p for p in parts_of_model(model) if p.circuit is None)
    assert addition.features.product_bits > 0
    assert addition.features.clamp_bits == 6 * 4
    # The long way's codes lie about a zero point, which takes a sign.
    assert addition.features.input_bits == 6 * (4 + 5)
    assert addition.features.end_bits == 6 * 4
    wide = residual.quantize(candidate_of(residual, activations=6))
    other = next(p for p in parts_of_model(wide) if p.circuit is None)
    assert other.features.product_bits > addition.features.product_bits


def test_the_short_way_of_a_block_is_held_and_does_not_lengthen_the_long_one(residual):
    model = residual.quantize(candidate_of(residual))
    steps = by_step(parts_of_model(model))
    whole = assembled(residual.graph, steps)
    assert whole.depth == sum(step.depth for step in steps.values())
    first, *long, addition, _ = steps.values()
    start = first.depth + sum(step.depth for step in long)
    held = whole.code_register_bits - sum(step.code_register_bits for step in steps.values())
    assert held == crossed(first.depth, start) * first.end_bits > 0
    assert whole.end_bits == 0  # accumulators leave
    assert addition.end_bits == 24


def test_a_looked_up_cost_knows_both_operands_of_an_addition(residual):
    cost = bound(residual)["lut"]
    narrow = candidate_of(residual)
    cost.cost(residual.graph, narrow)
    for name in narrow.activation_bits:
        wider = Candidate(narrow.layers, tuple({**narrow.activation_bits, name: 7}.items()))
        assert cost.cost(residual.graph, wider) == cost.cost_of(residual.quantize(wider))


def test_positions_share_the_registers_of_their_inputs():
    torch.manual_seed(0)
    bank, _ = bank_of(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)), 2, 6, 6)
    first = parts_of_model(bank.quantize(candidate_of(bank)))[0]
    alone = first.kept.features.times(16).input_bits
    assert 2 * 36 * 8 <= first.features.input_bits < alone


def bound(bank: WeightBank, family: str = "xc7") -> dict[str, CostModel]:
    return {name: cost_model(name).bound(bank, {"fpga": family}) for name in FPGA_COSTS}


def test_a_looked_up_cost_is_the_computed_one(bank):
    costs = bound(bank)
    for weights, activations in ((3, 4), (4, 4), (3, 8), (4, 8)):
        candidate = candidate_of(bank, weights, activations)
        model = bank.quantize(candidate)
        for cost in costs.values():
            assert cost.cost(bank.graph, candidate) == cost.cost_of(model)
    mixed = candidate_of(bank, 3).replace({bank.graph.layers[1].name: 4})
    wanted = costs["lut"].cost_of(bank.quantize(mixed))
    assert costs["lut"].cost(bank.graph, mixed) == wanted  # every layer was met in another network


def test_more_bits_cost_more_and_nothing_takes_a_multiplier(bank):
    costs = bound(bank)
    narrow, wide = candidate_of(bank, 3), candidate_of(bank, 8)
    for name in ("lut", "ff"):
        assert costs[name].cost(bank.graph, narrow) < costs[name].cost(bank.graph, wide)
    assert costs["dsp"].cost(bank.graph, wide) == costs["bram"].cost(bank.graph, wide) == 0
    assert costs["cycles"].cost(bank.graph, wide) >= 3


def test_what_has_no_circuit_says_why(bank):
    lut = bound(bank)["lut"]
    floats = Candidate.of({layer.name: 4 for layer in bank.graph.layers})
    with pytest.raises(UsageError, match="add --activation-bits"):
        lut.cost(bank.graph, floats)
    with pytest.raises(UsageError, match="its weights stay float"):
        lut.cost(bank.graph, Candidate.of({}, edges_at(bank, 4)))
    with pytest.raises(UsageError, match=r"'virtex2'; known are .*xc7"):
        cost_model("lut").bound(bank, {"fpga": "virtex2"})
    with pytest.raises(ValueError, match="bind it"):
        cost_model("lut").cost(bank.graph, floats)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")
def test_yosys_counts_what_is_fitted():
    rng = np.random.default_rng(0)
    circuit = Circuit(rng.integers(-7, 8, (6, 8)), 0, 15)
    logic = traced([circuit])
    assert agrees(logic, [circuit])
    pipeline, adders = pipelined(logic)
    cells = synthesize(pipeline, "xc7")
    assert 0.5 * adders.lut < cells.lut <= 1.1 * adders.lut
    assert cells.ff > 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        return self.head(functional.relu(self.second(x) + x))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")
def test_yosys_counts_what_is_fitted_for_a_whole_residual_block():
    torch.manual_seed(0)
    bank, _ = bank_of(Block(), 4)
    model = bank.quantize(candidate_of(bank, 3, 3))
    pipeline, adders = pipelined(unroll(lower(model), bank.graph).logic)
    cells = synthesize(pipeline, "xc7")
    found = {name: cost.cost_of(model) for name, cost in bound(bank).items()}
    assert found["lut"] == pytest.approx(cells.lut, rel=0.15)
    assert found["ff"] == pytest.approx(cells.ff, rel=0.2)
    assert found["cycles"] == pytest.approx(adders.stages, abs=2)
