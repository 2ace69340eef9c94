"""Settings of the strategies that learn widths: those of all, and those of the method."""

from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from quant_ops.learned_widths.base import LearnedWidths, WidthSettings


@dataclass(frozen=True)
class GradientSettings:
    """Settings of every method; the recipe of the training is `--set finetune.KEY=VALUE`.

    Attributes:
        steps: of the optimizer for each size; 0 takes `finetune.steps`, else what fits into
            --time-limit or --finetune, else 3,000.
        learning: share of the steps in which widths are learned; in the rest they are fixed.
        group: consecutive channels that share a learned width; 0 takes the groups of
            --granularity, and where it is "layer" 8 channels, or 1 under self-compressing (a whole
            layer where the target has one width per layer).
        travel: how far the parameter of a width can move in the learning, in its own units.
        harvest: points recorded on the way to each size.
        inherit: a finished model starts the next smaller size.
        warm: widths start from the best candidate that other strategies of the run have measured.
    """

    steps: int = 0
    learning: float = 0.5
    group: int = 0
    travel: float = 20.0
    harvest: int = 3
    inherit: bool = True
    warm: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "group", "harvest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.learning < 1:
            raise ValueError(f"learning must lie between 0 and 1, got {self.learning}")
        if self.travel <= 0:
            raise ValueError(f"travel must be above 0, got {self.travel}")


def settings_with(method: type[LearnedWidths]) -> type[GradientSettings]:
    """`GradientSettings` and the fields of a method's own settings.

    `freeze` is left out: widths freeze where their learning ends.
    """
    types = get_type_hints(method.Settings)
    own = [(f.name, types[f.name], field(default=f.default)) for f in _own_fields(method.Settings)]

    def check(self: GradientSettings) -> None:
        GradientSettings.__post_init__(self)
        method_settings(method, self)

    namespace = {"__post_init__": check}
    name = f"{method.__name__}Settings"
    made: type[GradientSettings] = make_dataclass(
        name, own, bases=(GradientSettings,), frozen=True, namespace=namespace
    )
    return made


def method_settings(method: type[LearnedWidths], settings: GradientSettings) -> WidthSettings:
    """The method's own settings, with widths that stay free to the end of the learning."""
    own = {f.name: getattr(settings, f.name) for f in _own_fields(method.Settings)}
    return method.Settings(freeze=1.0, **own)


def _own_fields(cls: type[WidthSettings]) -> list[Field[Any]]:
    found = [f for f in fields(cls) if f.name != "freeze"]
    assert all(f.default is not MISSING for f in found)
    return found
