"""Human units, parsed once at the edge: MB = 10^6 bytes, MiB = 2^20 bytes, limits inclusive."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from quant_ops.errors import BudgetError

SIZE = "size_bytes"

_SIZE_UNITS = {
    "": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KiB": 2**10, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIME_UNITS = {"": Decimal(1), "us": Decimal("1e-3"), "ms": Decimal(1), "s": Decimal(1000)}
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+) *([A-Za-z]*)")
_SIZE_FORMS = "4MB (10^6 bytes), 4MiB (2^20 bytes), 105kB, 105KiB, 140000B or 140000"

_BYTE_COSTS = {"size": SIZE, SIZE: SIZE, "ram": "ram_bytes"}
_COUNT_COSTS = {"bops": "bops", "macs": "macs", "ebops": "ebops"}
_TIME_COSTS = {"latency": "latency_ms", "latency_ms": "latency_ms"}
_FPGA_UNITS = {"lut": "LUT", "ff": "FF", "dsp": "DSP", "bram": "BRAM", "cycles": "cycles"}
_ENERGY_UNITS: dict[str, int | Decimal] = {"pJ": Decimal("1e-3"), "nJ": 1, "uJ": 10**3, "mJ": 10**6}


def parse_size(text: str) -> int:
    """Bytes that `text` stands for; a fraction of a byte is dropped.

    >>> parse_size("4MB"), parse_size("4MiB"), parse_size("1.5kB"), parse_size("140000B")
    (4000000, 4194304, 1500, 140000)

    Raises:
        BudgetError: not a size, or less than one byte.
    """
    n_bytes = _scaled(text, _SIZE_UNITS)
    if n_bytes is None:
        raise BudgetError(f"{text!r} is not a size; write it as {_SIZE_FORMS}")
    if n_bytes < 1:
        raise BudgetError(f"{text!r} is less than one byte; write a size as {_SIZE_FORMS}")
    return int(n_bytes)


def parse_count(text: str) -> int:
    """A number of operations, with k, M, G or T for powers of 1000.

    >>> parse_count("1G"), parse_count("20.5M"), parse_count("300")
    (1000000000, 20500000, 300)

    Raises:
        BudgetError: not a count, or less than one.
    """
    count = _scaled(text, _COUNT_UNITS)
    if count is None or count < 1:
        raise BudgetError(
            f"{text!r} is not a positive number of operations; write it as 1G, 20M, 300k or 300000"
        )
    return int(count)


def parse_time(text: str) -> float:
    """Milliseconds; without a unit the number itself, as tables in relative units have it.

    >>> parse_time("2ms"), parse_time("150us"), parse_time("0.01s"), parse_time("4.22")
    (2.0, 0.15, 10.0, 4.22)

    Raises:
        BudgetError: not a time, or not above 0.
    """
    value = _scaled(text, _TIME_UNITS)
    if value is None or value <= 0:
        raise BudgetError(f"{text!r} is not a time; write it as 2ms, 150us, 0.01s or 2 (ms)")
    return float(value)


def parse_energy(text: str) -> float:
    """Nanojoules that `text` stands for.

    >>> parse_energy("20uJ"), parse_energy("500pJ")
    (20000.0, 0.5)

    Raises:
        BudgetError: not an energy, or none.
    """
    nanojoules = _scaled(text, _ENERGY_UNITS)
    if not nanojoules:
        raise BudgetError(f"{text!r} is not a positive energy; write it as 500nJ, 20uJ or 1.5mJ")
    return float(nanojoules)


def parse_budget(text: str) -> tuple[str, float]:
    """Cost name and inclusive limit of one `--budget`.

    >>> parse_budget("4MB"), parse_budget("bops=1G"), parse_budget("latency=2ms")
    (('size_bytes', 4000000.0), ('bops', 1000000000.0), ('latency_ms', 2.0))

    Raises:
        BudgetError: an unknown cost, one that is not available yet, or no number.
    """
    key, equals, value = text.partition("=")
    if not equals:
        return SIZE, float(parse_size(text))
    key = key.strip().lower()
    if key in _BYTE_COSTS:
        return _BYTE_COSTS[key], float(parse_size(value))
    if key in _COUNT_COSTS:
        return _COUNT_COSTS[key], float(parse_count(value))
    if key in _TIME_COSTS:
        return _TIME_COSTS[key], parse_time(value)
    if key == "energy":
        return "energy_nj", parse_energy(value)
    if key in _FPGA_UNITS:
        return key, 0.0 if value.strip() == "0" else float(parse_count(value))
    known = "4MB, ram=256kB, bops=1G, macs=20M, ebops=100k, latency=2ms, lut=20k, energy=20uJ"
    raise BudgetError(f"{key!r} in the budget {text!r} is not a cost; budgets look like {known}")


@dataclass(frozen=True, slots=True)
class Budgets:
    """What was asked with every `--budget`.

    Attributes:
        requested: cost name to every limit given, ascending.
    """

    requested: Mapping[str, tuple[float, ...]]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Budgets":
        """From the command's arguments.

        >>> Budgets.parse(["4MB", "2MB", "bops=1G"]).limits
        {'size_bytes': 4000000.0, 'bops': 1000000000.0}
        """
        requested: dict[str, set[float]] = {}
        for text in texts:
            name, limit = parse_budget(text)
            requested.setdefault(name, set()).add(limit)
        return cls({name: tuple(sorted(limits)) for name, limits in requested.items()})

    @property
    def limits(self) -> dict[str, float]:
        """Cost name to its loosest limit: what the search keeps to."""
        return {name: limits[-1] for name, limits in self.requested.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size budget in bytes, ascending: the rows of the report."""
        return tuple(int(limit) for limit in self.requested.get(SIZE, ()))


def format_size(n_bytes: float) -> str:
    """Bytes as printed, decimal units, three significant digits or more.

    >>> format_size(4_000_000), format_size(139_872), format_size(999), format_size(44_695_144)
    ('4.00 MB', '139.87 kB', '999 B', '44.70 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def format_count(count: float) -> str:
    """A number of operations as printed.

    >>> format_count(40_551_040), format_count(1.3e9), format_count(12)
    ('40.6 M', '1.3 G', '12')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.4g}"


def format_cost(name: str, value: float) -> str:
    """A cost as printed, its unit read off the cost's name.

    >>> format_cost("ram_bytes", 256e3), format_cost("bops", 2e9), format_cost("latency_ms", 1.25)
    ('256.00 kB', '2.0 Gop', '1.25 ms')
    """
    if name.endswith("_bytes"):
        return format_size(value)
    if name == "energy_nj":
        return f"{value / 1e3:.4g} uJ"
    if name.endswith("_ms"):
        return f"{value:.4g} ms" if value >= 0.1 else f"{1e3 * value:.4g} us"
    if name in _COUNT_COSTS.values():
        return f"{format_count(value)}op" if value >= 1e3 else f"{value:.0f} op"
    if name in _FPGA_UNITS:
        return f"{value:,.0f} {_FPGA_UNITS[name]}"
    return f"{value:.4g}"


def _scaled(text: str, units: Mapping[str, int | Decimal]) -> Decimal | None:
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in units:
        return None
    return Decimal(found[1].replace("_", "")) * units[found[2]]
