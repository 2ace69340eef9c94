"""Every search method by name. A module is imported only when its strategy is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from quant_ops.errors import UsageError
from search.strategy import Strategy, Traits

STRATEGIES = {
    "auto": "search.strategies.auto:Auto",
    "uniform": "search.strategies.uniform:Uniform",
    "rate-distortion": "search.strategies.rate_distortion:RateDistortion",
    "local-search": "search.strategies.local_search:LocalSearch",
    "nsga2": "search.strategies.optuna_sampler:NSGA2",
    "nsga3": "search.strategies.optuna_sampler:NSGA3",
    "tpe": "search.strategies.optuna_sampler:TPE",
    "random": "search.strategies.random_search:RandomSearch",
}


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
    types = get_type_hints(cls.Settings)
    keys = [field.name for field in fields(cls.Settings)]
    typed: dict[str, object] = {}
    for key, value in (settings or {}).items():
        if key not in keys:
            known = f"it knows {', '.join(keys)}" if keys else "it has no settings"
            raise UsageError(f"strategy {name!r} has no setting {key!r}; {known}")
        is_text = isinstance(value, str)
        typed[key] = _read(f"{name}.{key}", str(value), types[key]) if is_text else value
    try:
        return cls(cls.Settings(**typed))
    except ValueError as error:
        raise UsageError(f"strategy {name!r}: {error}") from error


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


_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _read(name: str, text: str, kind: Any) -> object:
    """`text` as a bool, int, float, str, or None where the field may be None."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        if option is NoneType and text.lower() == "none":
            return None
        if option is bool and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if option in (int, float, str):
            try:
                return option(text)
            except ValueError:
                continue
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise UsageError(f"--set {name} wants {wanted}, got {text!r}")
