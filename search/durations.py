"""Durations as people write them."""

from quant_ops.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds written as 90, 90s, 5m or 1.5h.

    >>> parse_duration("90s"), parse_duration("5m"), parse_duration("1.5h")
    (90.0, 300.0, 5400.0)

    Raises:
        UsageError: anything else.
    """
    stripped = text.strip().lower()
    unit = stripped[-1:] if stripped[-1:] in _SECONDS else ""
    try:
        value = float(stripped.removesuffix(unit) if unit else stripped)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"a time such as 90s, 5m or 1h is wanted, got {text!r}")
    return value * _SECONDS[unit or "s"]


def format_duration(seconds: float) -> str:
    """Short spelling for people.

    >>> format_duration(12.34), format_duration(75), format_duration(4000)
    ('12.3 s', '1 min 15 s', '1 h 06 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
