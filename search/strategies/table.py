"""Every search method by name. A module is imported only when its strategy is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from quant_ops.errors import UsageError
from search.settings import read_settings
from search.strategy import Strategy, Traits

STRATEGIES = {
    "auto": "search.strategies.auto:Auto",
    "uniform": "search.strategies.uniform:Uniform",
    "rate-distortion": "search.strategies.rate_distortion:RateDistortion",
    "channel-allocation": "search.strategies.channel_allocation:ChannelAllocation",
    "local-search": "search.strategies.local_search:LocalSearch",
    "nsga2": "search.strategies.optuna_sampler:NSGA2",
    "nsga3": "search.strategies.optuna_sampler:NSGA3",
    "tpe": "search.strategies.optuna_sampler:TPE",
    "random": "search.strategies.random_search:RandomSearch",
    "ajpq": "agents.ajpq:AJPQ",
    "haq": "agents.haq:HAQ",
    "amc": "agents.amc:AMC",
    "two-step": "agents.two_step:TwoStep",
    "hgq": "search.strategies.gradient_methods:HGQStrategy",
    "diffq": "search.strategies.gradient_methods:DiffQStrategy",
    "bayesian-bits": "search.strategies.gradient_methods:BayesianBitsStrategy",
    "dqa": "search.strategies.gradient_methods:DQAStrategy",
    "fracbits": "search.strategies.gradient_methods:FracBitsStrategy",
    "self-compressing": "search.strategies.gradient_methods:SelfCompressingStrategy",
    "csq": "search.strategies.gradient_methods:CSQStrategy",
    "limpq": "search.strategies.limpq:LIMPQStrategy",
}
RECOVERY = "recovery"
NO_STRATEGIES = (RECOVERY, "finetune")  # but have settings too


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of `search strategies`."""

    name: str
    traits: Traits
    settings: Mapping[str, object]  # key to default

    def to_json(self) -> dict[str, Any]:
        """A JSON value, one key per column."""
        return {
            "name": self.name,
            **asdict(self.traits),
            "settings": {key: str(value) for key, value in self.settings.items()},
        }


def strategy_class(name: str) -> type[Strategy]:
    """The class behind a name; an unknown name is a `UsageError`."""
    if name not in STRATEGIES:
        raise UsageError(f"there is no strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    module, _, attribute = STRATEGIES[name].partition(":")
    found: type[Strategy] = getattr(import_module(module), attribute)
    return found


def make_strategy(name: str, settings: Mapping[str, object] | None = None) -> Strategy:
    """The strategy with some settings changed; texts are read as the type of their field."""
    cls = strategy_class(name)
    return cls(read_settings(cls.Settings, settings or {}, name))


def parse_settings(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """`NAME.KEY=VALUE` texts to strategy name to key to text, for `make_strategy`.

    >>> parse_settings(["nsga2.population=32", "auto.points=8"])
    {'nsga2': {'population': '32'}, 'auto': {'points': '8'}}
    """
    settings: dict[str, dict[str, str]] = {}
    for text in texts:
        left, equals, value = text.partition("=")
        name, dot, key = left.strip().rpartition(".")
        if not (equals and dot and name and key):
            raise UsageError(f"--set wants NAME.KEY=VALUE, got {text!r}")
        if name not in NO_STRATEGIES:
            strategy_class(name)
        settings.setdefault(name, {})[key] = value.strip()
    return settings


def capability_table() -> list[Capability]:
    """Every strategy with its traits and settings, in the table's order."""
    rows = []
    for name in STRATEGIES:
        cls = strategy_class(name)
        default = cls.Settings()
        settings = {field.name: getattr(default, field.name) for field in fields(cls.Settings)}
        rows.append(Capability(name, cls.traits, settings))
    return rows
