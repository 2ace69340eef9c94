"""Settings as texts, `NAME.KEY=VALUE`, read as the types of a dataclass's fields."""

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from quant_ops.errors import UsageError

S = TypeVar("S")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_settings(cls: type[S], texts: Mapping[str, object], name: str) -> S:
    """`cls` with some fields changed; texts are read as the type of their field.

    Args:
        cls: a dataclass; its defaults stand where nothing is given.
        texts: key to text, or to a value of the right type.
        name: what the settings belong to, for messages.

    Raises:
        UsageError: there is no such key, or the value does not fit.
    """
    types = get_type_hints(cls)
    keys = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    typed: dict[str, object] = {}
    for key, value in texts.items():
        if key not in keys:
            known = f"it knows {', '.join(keys)}" if keys else "it has no settings"
            raise UsageError(f"{name!r} has no setting {key!r}; {known}")
        is_text = isinstance(value, str)
        typed[key] = _read(f"{name}.{key}", str(value), types[key]) if is_text else value
    try:
        return cls(**typed)
    except ValueError as error:
        raise UsageError(f"{name!r}: {error}") from error


def settings_of(cls: type[S], settings: Mapping[str, str], name: str) -> S:
    """`cls` as the settings `name.KEY` of a run say.

    Raises:
        UsageError: there is no such key, or the value does not fit.
    """
    start = f"{name}."
    own = {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start)}
    return read_settings(cls, own, name)


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
