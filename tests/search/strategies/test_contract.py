"""Every row of the table under the shared contract."""

from search.strategies.table import STRATEGIES, strategy_class
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
    # strategies that train have tests of their own: no formula can be trained
    ours = {
        name
        for name, where in STRATEGIES.items()
        if where.startswith("search.") and not strategy_class(name).traits.needs_training
    }
    under = (cls for cls in StrategyContract.__subclasses__() if cls.__module__ == __name__)
    assert ours == {cls.name for cls in under}


class TestChannelAllocation(StrategyContract):
    name = "channel-allocation"
    settings = {"rule": "all"}  # noqa: RUF012
