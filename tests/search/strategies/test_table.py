"""Names, settings and their errors."""

import re

import pytest

from quant_ops.errors import UsageError
from search.strategies.table import (
    STRATEGIES,
    capability_table,
    make_strategy,
    parse_settings,
)


def test_capability_table_has_every_strategy_with_a_summary():
    rows = capability_table()
    assert [row.name for row in rows] == list(STRATEGIES)
    assert all(row.traits.summary for row in rows)


def test_settings_are_read_as_the_type_of_their_field():
    texts = parse_settings(["nsga2.population=32", "nsga2.warm_start=false", "auto.points=8"])
    nsga2 = make_strategy("nsga2", texts["nsga2"]).settings
    assert (nsga2.population, nsga2.warm_start) == (32, False)
    assert make_strategy("auto", texts["auto"]).settings.points == 8


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nsga4", {}, "there is no strategy 'nsga4'; choose from auto, uniform"),
        ("nsga2", {"size": "3"}, "no setting 'size'; it knows population, warm_start"),
        ("uniform", {"size": "3"}, "no setting 'size'; it has no settings"),
        ("nsga2", {"population": "many"}, "--set nsga2.population wants int, got 'many'"),
        ("nsga2", {"warm_start": "perhaps"}, "--set nsga2.warm_start wants bool"),
        ("nsga2", {"population": "1"}, "'nsga2': population must be at least 2"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(name, settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        make_strategy(name, settings)


@pytest.mark.parametrize("text", ["population=3", "nsga2.population", ".a=1", "=3"])
def test_a_setting_without_strategy_key_or_value_is_refused(text):
    with pytest.raises(UsageError, match=r"NAME\.KEY=VALUE"):
        parse_settings([text])
