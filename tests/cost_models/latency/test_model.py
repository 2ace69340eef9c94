import pickle

import pytest

from cost_models.latency.grid import task_walks
from cost_models.latency.lowering import calls_of, smaller_network
from cost_models.latency.model import Latency
from cost_models.latency.table import Entry, Rule
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.edges import activation_edges
from quant_ops.errors import UsageError
from quant_ops.removal import NOTHING


@pytest.fixture
def table(graph, make_table):
    empty = make_table([])
    walks = task_walks(graph, empty.kernel_for, empty.weight_bytes)
    return make_table({(w, k): 0 for walk in walks for w, k, _ in walk}, call_overhead=3.0)


def names(graph):
    return [layer.name for layer in graph.searchable_layers]


def integers(graph, widths=8.0):
    edges = {e.name: 8 for e in activation_edges(graph) if e.kind not in ("output", "partial")}
    return Candidate.of(dict.fromkeys(names(graph), widths), edges)


def described(calls):
    return [f"{c.work.describe()} {c.kernel}".strip() for c in calls if c.work.operator != "view"]


def test_a_float_network_is_fused_calls_in_one_layout(graph, table):
    calls = calls_of(graph, Candidate.of({}), NOTHING, table.kernel_for)
    assert described(calls) == [
        "3x3 convolution 1 -> 16 at 8x8 float32",
        "3x3 convolution 16 -> 16 at 8x8 with addition float32",
        "max_pool of 16 x 8 x 8 float32",
        "3x3 convolution 16 -> 24 at 4x4 stride 2 float32",
        "mean of 24 x 2 x 2 float32",
        "layout of 24 float32",
        "linear 24 -> 10 float32",
    ]


def test_an_integer_network_changes_type_once(graph, table):
    calls = calls_of(graph, integers(graph), NOTHING, table.kernel_for)
    kinds = [c.work.operator for c in calls]
    assert kinds.count("quantize") == 1
    assert "dequantize" not in kinds
    assert {c.kernel for c in calls} <= {"int8", ""}


def test_edges_between_codes_and_floats_cost_a_conversion(graph, table):
    edges = dict(integers(graph).activations)
    first = next(iter(edges))
    half = Candidate.of({"one": 8}, {first: 8})
    calls = calls_of(graph, half, NOTHING, table.kernel_for)
    kinds = [c.work.operator for c in calls]
    assert kinds.index("quantize") < kinds.index("conv") < kinds.index("dequantize")
    assert [c.kernel for c in calls if c.work.operator == "conv"] == ["int8", "float32", "float32"]


def test_latency_is_the_run_and_the_sum_of_its_calls(graph, table, expected):
    candidate = integers(graph)
    calls = calls_of(graph, candidate, NOTHING, table.kernel_for)
    wanted = 3.0 + sum(expected(c.work, c.kernel) for c in calls if c.kernel)
    assert Latency(table).cost(graph, candidate) == pytest.approx(1e-3 * wanted)


def test_a_width_without_a_kernel_costs_what_the_wider_kernel_costs(graph, table):
    model = Latency(table)
    assert model.cost(graph, integers(graph, 4.0)) == model.cost(graph, integers(graph, 8.0))
    weights_only = [Candidate.of(dict.fromkeys(names(graph), b)) for b in (3.0, 4.0, 8.0)]
    three, four, eight = (model.cost(graph, c) for c in weights_only)
    assert three == four != eight


def test_widths_of_inputs_choose_kernels_too(graph, make_table):
    rules = (Rule("int4", ("linear",), 4, 4), *make_table([]).rules)
    empty = make_table([], rules=rules)
    walks = task_walks(graph, empty.kernel_for, empty.weight_bytes)
    kernels = {(w, k): 1.0 if k == "int4" else 9.0 for walk in walks for w, k, _ in walk}
    entries = tuple(Entry(w, k, (time,)) for (w, k), time in kernels.items())
    model = Latency(make_table([], rules=rules, entries=entries))
    wide = Candidate.of(dict.fromkeys(names(graph), 4.0), dict(integers(graph).activations))
    fast = Candidate.of(dict.fromkeys(names(graph), 4.0), {name: 4 for name, _ in wide.activations})
    assert model.cost(graph, wide) - model.cost(graph, fast) == pytest.approx(8e-3)


def pruned(graph):
    widths = {
        "one": (0,) * 6 + (8,) * 10,
        "two": (0,) * 6 + (8,) * 10,
        "three": (0,) * 7 + (4,) * 17,
    }
    return Candidate.of({n: LayerQuant(w) for n, w in widths.items()} | {"head": LayerQuant((8,))})


def test_removed_channels_leave_the_shapes(graph, table):
    removed = pruned(graph)
    smaller, widths = smaller_network(graph, removed)
    of_smaller = calls_of(smaller, widths, NOTHING, table.kernel_for)
    assert "3x3 convolution 10 -> 17 at 4x4 stride 2 float32" in described(of_smaller)
    model = Latency(table)
    assert model.cost(graph, removed) == pytest.approx(1e-3 * model.total(of_smaller))


def test_a_worker_gets_a_model_that_says_the_same(graph, table):
    model = Latency(table)
    wanted = model.cost(graph, integers(graph))
    assert pickle.loads(pickle.dumps(model)).cost(graph, integers(graph)) == wanted


def test_without_a_table_it_says_where_to_get_one(graph):
    with pytest.raises(UsageError, match="give --latency-table FILE or a name"):
        Latency().cost(graph, integers(graph))


def test_every_width_of_a_task_can_be_looked_up(graph, table):
    model = Latency(table)
    for bits in (1.0, 1.6, 2.0, 5.0, 8.0):
        assert model.cost(graph, Candidate.of(dict.fromkeys(names(graph), bits))) > 0
        assert model.cost(graph, integers(graph, bits)) > 0
    alone = Candidate.of({n: LayerQuant((0,) * (graph.layer_of[n].out_channels - 1) + (4,))
                          for n in ("one", "two", "three")})  # fmt: skip
    assert model.cost(graph, alone) < model.cost(graph, Candidate.of({}))
