"""What was asked for: the settings of a run, as stored in its config.json."""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from quant_ops.errors import UsageError
from search.atomic import write_text

FORMAT = "bitfront-config"
VERSION = 1
DEFAULT_TRIALS = 160
CORRECTIONS = ("none", "mean", "mean-spread", "analytic")
GRANULARITIES = ("auto", "layer", "group", "channel")
PREPARATIONS = ("equalize", "absorb")  # in the order in which they are done
# Kullback-Leibler losses of a thousand images rank candidates as well as all of them do; the
# finished front is measured on the whole validation split.
SEARCH_SAMPLES = 1024
PROBE_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Settings of one run; every field has the meaning of the option of the same name."""

    task: str = "digits"
    data: str | None = None
    budgets: tuple[str, ...] = ()
    max_drop: float | None = None
    strategies: tuple[str, ...] = ("auto",)
    settings: Mapping[str, str] = field(default_factory=dict)
    trials: int | None = None
    time_limit_s: float | None = None
    seed: int = 0
    bits: tuple[float, ...] = ()
    pins: Mapping[str, float] = field(default_factory=dict)
    activation_bits: tuple[int, ...] = ()
    granularity: str = "auto"
    dual: tuple[str, ...] = ()
    target: str = "packed"
    latency_table: str | None = None
    extrapolate: bool = False
    fpga: str | None = None
    scheme: str = "auto"
    range_setter: str = "weighted_mse"
    activation_ranges: str = "auto"
    correction: str = "mean-spread"
    prepare: tuple[str, ...] = ()
    objective: str = "loss"
    distortion: str = "exact"
    early_stop: bool = True
    recover: str = "none"
    finetune_s: float | None = None
    device: str = "auto"
    codec: str = "plain"
    workers: int = 0
    ray_address: str | None = None
    threads: int = 0
    storage: str | None = None
    search_samples: int = SEARCH_SAMPLES
    probe_samples: int = PROBE_SAMPLES

    @property
    def trial_limit(self) -> int | None:
        """Trials to make; None when only the time limits the run."""
        if self.trials is not None:
            return self.trials
        return None if self.time_limit_s is not None else DEFAULT_TRIALS

    @property
    def finetunes(self) -> bool:
        """Whether finished points are trained."""
        return self.finetune_s is not None or "finetune.steps" in self.settings

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; unknown keys of newer versions are refused."""
        known = {f.name for f in fields(cls)}
        unknown = set(value) - known
        if unknown:
            raise UsageError(f"the run's config.json holds unknown settings {sorted(unknown)}")
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**settings)


def environment() -> dict[str, str]:
    """Versions and machine, for config.json."""
    names = ("bitfront", "torch", "numpy", "optuna", "scipy", "ray")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        **versions,
        "python": platform.python_version(),
        "platform": sys.platform,
        "machine": platform.machine(),
    }


def write_config(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Write config.json: what was asked, versions, digests of model and data.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "asked": config.to_json(),
        "environment": environment(),
        **facts,
    }
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


def store_settings(folder: Path, settings: Mapping[str, str]) -> None:
    """Add to the stored settings of a run what was found out on the way.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    _, content = read_config(folder)
    content["asked"]["settings"] |= settings
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


def read_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The settings of the run in `folder`, and the other facts of its config.json.

    Raises:
        UsageError: the folder holds no run.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no run (there is no config.json); name the folder that "
            f"`search run` printed"
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a run of this program")
    return RunConfig.from_json(content["asked"]), content
