import pytest

from quant_ops.errors import BudgetError
from search.budget import Budgets, format_size, parse_budget, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4MB", 4_000_000), ("4MiB", 4 * 2**20), ("105kB", 105_000), ("105KB", 105_000),
        ("105KiB", 105 * 1024), ("140000", 140_000), ("140000B", 140_000), ("140_000", 140_000),
        (" 2 MB ", 2_000_000), ("0.1MB", 100_000), ("1.0000019MB", 1_000_001), ("1GB", 10**9),
        (".5kB", 500), ("1", 1),
    ],
)  # fmt: skip
def test_a_size_is_parsed_to_the_byte(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MB",
        "4Mb",
        "4M",
        "4mb",
        "-4MB",
        "4,5MB",
        "4MB!",
        "inf",
        "nan",
        "1e6",
        "0x10",
        "4 M B",
        "٤",
    ],
)
def test_what_is_not_a_size_names_the_accepted_forms(text):
    with pytest.raises(BudgetError, match=r"is not a size; write it as 4MB .*4MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0MB", "0.9", "0.0009kB"])
def test_a_size_holds_at_least_one_byte(text):
    with pytest.raises(BudgetError, match="less than one byte"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "cost", "limit"),
    [
        ("4MB", "size_bytes", 4e6), ("size=4MiB", "size_bytes", 4 * 2**20),
        ("bops=1G", "bops", 1e9),
        ("latency=2ms", "latency_ms", 2), ("latency=9us", "latency_ms", 9e-3),
        ("macs=20M", "macs", 2e7), ("ram=256kB", "ram_bytes", 256e3), ("BOPS=300", "bops", 300),
        ("lut=20k", "lut", 20_000), ("dsp=0", "dsp", 0), ("energy=1.5uJ", "energy_nj", 1500),
    ],
)  # fmt: skip
def test_a_budget_names_a_cost_and_its_limit(text, cost, limit):
    assert parse_budget(text) == (cost, limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency=2MB", "is not a time"), ("latency=0ms", "is not a time"),
        ("energy=1", "is not a positive energy"),
        ("watts=1", "is not a cost; budgets look like 4MB"), ("lut=-1", "not a positive number"),
        ("bops=1GB", "not a positive number of operations"), ("bops=0", "not a positive number"),
        ("ram=", "is not a size"), ("=4MB", "is not a cost"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_kept_says_why(text, says):
    with pytest.raises(BudgetError, match=says):
        parse_budget(text)


def test_the_loosest_of_several_size_budgets_limits_the_search_and_all_are_reported():
    budgets = Budgets.parse(["2MB", "4MB", "1MB", "4MB", "bops=1G"])
    assert budgets.limits == {"size_bytes": 4e6, "bops": 1e9}
    assert budgets.sizes == (1_000_000, 2_000_000, 4_000_000)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4_000_000, "4.00 MB"), (1e9, "1.00 GB")],
)
def test_a_size_is_printed_with_its_unit(n_bytes, text):
    assert format_size(n_bytes) == text
