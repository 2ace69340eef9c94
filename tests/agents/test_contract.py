"""Every agent of the table under the contract of all strategies."""

from search.strategies.table import STRATEGIES
from search.testing import StrategyContract

SMALL = {"hidden": 16, "steps": 2, "proposals": 2, "members": 2}
CHANNELS = {"n_groups": 4, "widths": (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)}


class TestAJPQ(StrategyContract):
    name = "ajpq"
    settings = SMALL
    needs = CHANNELS


class TestHAQ(StrategyContract):
    name = "haq"
    settings = SMALL


class TestAMC(StrategyContract):
    name = "amc"
    settings = SMALL
    needs = CHANNELS


class TestTwoStep(StrategyContract):
    name = "two-step"
    settings = SMALL
    needs = CHANNELS


def test_every_agent_is_under_the_contract():
    ours = {name for name, where in STRATEGIES.items() if where.startswith("agents.")}
    under = (cls for cls in StrategyContract.__subclasses__() if cls.__module__ == __name__)
    assert ours == {cls.name for cls in under}
