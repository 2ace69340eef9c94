"""Memory of known networks against figures worked out by hand, and energy of a small one."""

import pytest
import torch
from torch import Tensor, nn

from cost_models.arena import ArenaRules, plan_arena
from cost_models.energy import Energy
from cost_models.memory import PeakMemory, microcontroller
from quant_ops.candidate import Candidate
from quant_ops.edges import activation_edges
from quant_ops.errors import UsageError
from quant_ops.graph import Graph
from quant_ops.packed_size import layer_term, size_bytes
from search.capture import trace
from search.tasks.models import CifarResNet


def at_8_bits(graph: Graph) -> Candidate:
    edges = {e.name: 8 for e in activation_edges(graph) if e.kind not in ("output", "partial")}
    return Candidate.of({layer.name: 4 for layer in graph.layers}, edges)


@pytest.fixture(scope="module")
def resnet20() -> Graph:
    return trace(CifarResNet(20).eval(), (torch.randn(2, 3, 32, 32),)).graph


class InvertedResidual(nn.Module):
    """1x1 expansion by 6, 3x3 depthwise, 1x1 projection [Sandler2018]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 6 * inputs
        self.expand = nn.Conv2d(inputs, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide)
        self.project = nn.Conv2d(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.expand(x))
        y = self.project(nn.functional.relu6(self.depthwise(y)))
        return x + y if self.adds else y


@pytest.fixture(scope="module")
def mobilenet() -> Graph:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(),
        InvertedResidual(16, 16, 1), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    return trace(model.eval(), (torch.randn(2, 3, 32, 32),)).graph


def test_resnet_20_holds_three_values_of_its_first_stage(resnet20):
    # The block's input waits for the addition, beside what its second convolution reads and writes.
    assert PeakMemory().cost(resnet20, at_8_bits(resnet20)) == 3 * 16 * 32 * 32
    assert PeakMemory().cost(resnet20, Candidate.of({})) == 4 * 3 * 16 * 32 * 32


def test_mobilenet_holds_a_block_s_input_and_both_sides_of_its_depthwise_layer(mobilenet):
    wanted = 16 * 16 * 16 + 2 * 96 * 16 * 16
    arena = plan_arena(mobilenet, at_8_bits(mobilenet))
    assert (arena.total_bytes, arena.is_optimal) == (wanted, True)


def columns(graph: Graph, candidate: Candidate, node: int) -> int:
    """Two columns of a convolution's windows, as kernels for microcontrollers unfold them."""
    layer = graph.layer_at.get(node)
    is_conv = layer is not None and layer.kind == "conv"
    return 2 * layer.weights_per_channel if is_conv else 0


def test_scratch_memory_and_alignment_are_part_of_the_arena(resnet20, mobilenet):
    rules = ArenaRules(alignment=16, element_bits=(8, 16, 32), scratch=columns)
    arena = plan_arena(resnet20, at_8_bits(resnet20), rules)
    assert arena.total_bytes == 3 * 16 * 32 * 32 + 2 * 9 * 16
    arena = plan_arena(mobilenet, at_8_bits(mobilenet), rules)
    assert arena.total_bytes == 16 * 16 * 16 + 2 * 96 * 16 * 16 + 32  # 2 x 9, aligned
    assert all(offset % 16 == 0 for offset in (*arena.offsets.values(), *arena.scratch.values()))


def test_elements_are_held_in_whole_containers(mobilenet):
    edges = {name: 3 for name, _ in at_8_bits(mobilenet).activations}
    packed = plan_arena(mobilenet, Candidate.of({}, edges)).total_bytes
    held = plan_arena(mobilenet, Candidate.of({}, edges), ArenaRules(element_bits=(8, 16, 32)))
    assert held.total_bytes == plan_arena(mobilenet, at_8_bits(mobilenet)).total_bytes
    assert packed == 3 * held.total_bytes // 8


def test_weights_are_read_in_place_streamed_or_held(resnet20):
    candidate = at_8_bits(resnet20)
    weights = {x.name: layer_term(resnet20, x, 4) for x in resnet20.layers}
    found = {w: microcontroller(resnet20, candidate, w) for w in ("flash", "streamed", "resident")}
    assert {m.flash_bytes for m in found.values()} == {size_bytes(resnet20, candidate)}
    values = 3 * 16 * 32 * 32
    assert found["flash"].ram_bytes == values
    assert found["resident"].ram_bytes == values + sum(weights.values())
    # The widest layers (64 channels) run where values are short, so the first stage decides.
    first = weights[resnet20.layers[2].name]
    assert found["streamed"].ram_bytes == values + first
    with pytest.raises(UsageError, match="weights are flash, streamed, resident"):
        microcontroller(resnet20, candidate, "disk")  # type: ignore[arg-type]


def test_energy_of_one_layer_is_arithmetic_and_traffic():
    graph = trace(nn.Linear(8, 4).eval(), (torch.randn(2, 8),)).graph
    edge = next(e.name for e in activation_edges(graph) if e.kind == "input")
    candidate = Candidate.of({graph.layers[0].name: 4}, {edge: 8})
    arithmetic = 32 * (4 * 8 * 0.003 + 0.1)
    moved = 8 * 8 * 2 + 4 * 32  # the input written and read, the output written
    traffic = (8 * size_bytes(graph, candidate) + moved) * 10 / 64
    assert Energy().cost(graph, candidate) == pytest.approx((arithmetic + traffic) / 1e3)
    floats = Energy().cost(graph, Candidate.of({}))
    moved = 8 * 32 * 2 + 4 * 32
    traffic = (8 * size_bytes(graph, Candidate.of({})) + moved) * 10 / 64
    assert floats == pytest.approx((32 * 4.6 + traffic) / 1e3)
