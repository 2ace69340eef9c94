import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from cost_models.latency.table import Entry, LatencyTable, load_table
from cost_models.latency.work import ATTRIBUTES, DIMS, Work
from quant_ops.errors import UsageError, VerificationError

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "cost_models" / "latency_table.schema.json").read_text())
LADDER = (16, 64, 256, 1024)
LINEARS = [
    (Work("linear", (a, b, 1)), kernel)
    for kernel in ("float32", "int8", "weight4")
    for a in LADDER
    for b in LADDER
]


def test_a_measured_call_costs_what_was_measured(make_table):
    table = make_table(LINEARS)
    for entry in table.entries:
        assert table.time(entry.work, entry.kernel) == pytest.approx(entry.time, rel=1e-12)


def test_sizes_between_follow_the_roofline(make_table, expected):
    table = make_table(LINEARS)
    work = Work("linear", (100, 300, 1))
    assert table.time(work, "int8") == pytest.approx(expected(work, "int8"), rel=0.02)
    assert max(fit.error[1] for fit in table.fits.values()) < 0.02


def test_outside_the_measured_sizes_it_refuses_unless_told(make_table, expected):
    table, work = make_table(LINEARS), Work("linear", (2048, 64, 1))
    with pytest.raises(UsageError, match=r"in_features 2048 \(measured: 16 to 1024\)"):
        table.time(work, "int8")
    guess = table.time(work, "int8", extrapolate=True)
    assert guess == pytest.approx(expected(work, "int8"), rel=0.05)


def test_a_kind_of_call_that_was_never_measured_is_named(make_table):
    conv = Work("conv", (16, 16, 8, 8), ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (1,), (0,)))
    with pytest.raises(UsageError, match="no entry of kernel 'int8' for a 3x3 convolution 16"):
        make_table(LINEARS).time(conv, "int8", extrapolate=True)


@pytest.mark.parametrize(
    ("operator", "weight_bits", "activation_bits", "kernel"),
    [
        ("conv", 4, 8, "int8"),  # no 4-bit convolution: widened
        ("conv", 2, 4, "int8"),
        ("conv", 4, 32, "float32"),
        ("linear", 3, 32, "weight4"),
        ("linear", 8, 32, "float32"),
        ("add", 0, 8, "int8"),
        ("softmax", 0, 8, ""),
    ],
)
def test_rules_say_what_a_width_runs_as(make_table, operator, weight_bits, activation_bits, kernel):
    assert make_table([]).kernel_for(operator, weight_bits, activation_bits) == kernel


def test_a_width_above_every_kernel_is_refused(make_table):
    table = make_table([], rules=make_table([]).rules[:1])
    with pytest.raises(UsageError, match="no kernel for conv with float weights and float"):
        table.kernel_for("conv", 32, 32)


def test_larger_networks_read_their_weights_slower(make_table):
    work = Work("linear", (64, 64, 1))
    entries = (
        Entry(work, "float32", (1.0,), resident_bytes=10**6),
        Entry(work, "float32", (3.0,), resident_bytes=10**8),
    )
    table = make_table([], entries=entries)
    times = [table.time(work, "float32", resident_bytes=b) for b in (0, 1e6, 1e7, 1e8, 1e9)]
    assert times == pytest.approx([1, 1, 2, 3, 3])


def test_an_entry_of_a_layer_wins_and_others_count_by_their_mean(make_table):
    work = Work("linear", (64, 64, 1))
    entries = tuple(Entry(work, "int8", (t,), name) for name, t in (("a", 1.0), ("b", 2.0)))
    table = make_table([], entries=entries)
    assert table.time(work, "int8", "b") == 2.0
    assert table.time(work, "int8", "c") == table.time(work, "int8") == 1.5


def test_a_file_gives_the_table_back_and_fits_the_schema(make_table, tmp_path):
    works = [*LINEARS, (Work("copy", (64, 8)), "int8")]
    table = make_table(works, libraries={"formula": "1"}, call_overhead=2.5)
    (tmp_path / "t.json").write_text(table.to_text())
    assert load_table(tmp_path / "t.json") == table
    jsonschema.validate(json.loads(table.to_text()), SCHEMA)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cost_models" / "tables").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_tables_are_sound(path):
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    table = load_table(path)
    assert table.name == path.stem
    assert LatencyTable.from_json(json.loads(table.to_text()), "again") == table


def test_the_schema_names_every_operator():
    assert set(SCHEMA["$defs"]["operator"]["enum"]) == set(DIMS) - {"view"}


def test_the_page_names_every_operator_size_and_attribute():
    page = (ROOT / "cost_models" / "LATENCY_TABLE.md").read_text()
    for operator in set(DIMS) - {"view"}:
        for word in (operator, *DIMS[operator], *ATTRIBUTES.get(operator, ())):
            assert f"`{word}`" in page, word


def test_a_measurement_that_was_not_finished_is_no_table_yet(make_table, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(dataclasses.replace(make_table(LINEARS), complete=False).to_text())
    with pytest.raises(UsageError, match="not complete: its measurement was interrupted"):
        load_table(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is not a latency table"),
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"unit": "hours"}, "unit 'hours' is none of us, relative"),
        ({"device": {"name": "x"}}, "needs a name and a fingerprint"),
        ({"kernels": []}, "is not among the kernels"),
        ({"entries": [{"operator": "warp"}]}, "operator 'warp' is none of"),
        (
            {"entries": [{"operator": "linear", "shape": {"rows": 1}, "kernel": "int8"}]},
            "needs whole numbers for in_features, out_features, rows",
        ),
        (
            {"entries": [Entry(LINEARS[0][0], "int8", ()).work.to_json() | {
                "kernel": "int8", "rounds": [-1.0]}]},
            "must be positive numbers, got",
        ),
    ],
)  # fmt: skip
def test_a_file_with_wrong_values_is_refused_in_a_sentence(make_table, tmp_path, change, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(make_table(LINEARS).to_json() | change))
    with pytest.raises(VerificationError, match=message):
        load_table(path)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UsageError, match="there is no latency table"):
        load_table(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(VerificationError, match="is not readable JSON"):
        load_table(tmp_path / "t.json")
