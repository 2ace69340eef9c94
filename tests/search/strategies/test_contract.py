"""Every row of the table under the shared contract."""

from search.strategies.table import STRATEGIES
from search.testing import StrategyContract


class TestAuto(StrategyContract):
    name = "auto"
    settings = {"points": 8}  # noqa: RUF012


class TestUniform(StrategyContract):
    name = "uniform"


class TestRateDistortion(StrategyContract):
    name = "rate-distortion"


class TestLocalSearch(StrategyContract):
    name = "local-search"


class TestNSGA2(StrategyContract):
    name = "nsga2"
    settings = {"population": 12}  # noqa: RUF012


class TestNSGA3(StrategyContract):
    name = "nsga3"
    settings = {"population": 12}  # noqa: RUF012


class TestTPE(StrategyContract):
    name = "tpe"
    settings = {"population": 12}  # noqa: RUF012


class TestRandom(StrategyContract):
    name = "random"


def test_every_strategy_of_this_package_is_under_the_contract():
    ours = {name for name, where in STRATEGIES.items() if where.startswith("search.")}
    assert ours == {cls.name for cls in StrategyContract.__subclasses__()}


class TestChannelAllocation(StrategyContract):
    name = "channel-allocation"
    settings = {"rule": "all"}  # noqa: RUF012
