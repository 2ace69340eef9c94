"""Trained controllers on disk: JSON and safetensors, nothing that runs."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agents.controllers import ALGORITHMS, Controller
from agents.episode import CHANNEL_FIELDS, LAYER_FIELDS
from agents.pilot import Pilot, Scope
from quant_ops.errors import UsageError

FORMAT, VERSION = "bitfront-policy", 1
DESCRIPTION = "policy.json"
INSIDE_A_RUN = ("checkpoints", "agents")


def layout_of(scope: Scope) -> dict[str, list[str]]:
    """What the controllers of a scope see and do, by name: equal layouts fit each other."""
    layout = {
        "layer observation": list(LAYER_FIELDS),
        "layer action": list(scope.actions),
    }
    if scope.by_channel:
        layout["channel observation"] = list(CHANNEL_FIELDS)
        layout["channel action"] = ["width"]
    return layout


def save_policy(pilot: Pilot, folder: Path, strategy: str) -> None:
    """Write policy.json and one safetensors file per controller into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, controller in _controllers(pilot):
        save_file(controller.tensors(), folder / f"{name}.safetensors")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "strategy": strategy,
        "algorithm": pilot.layers.algorithm,
        "hidden": pilot.layers.hidden,
        "layout": layout_of(pilot.scope),
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")


def load_policy(path: Path, scope: Scope, strategy: str) -> Pilot:
    """The controllers in a folder, or in the folder of a run that left some.

    Raises:
        UsageError: there are none, they are damaged, or they see or do other things.
    """
    folder = _folder(path, strategy)
    content = _description(folder)
    _require_layout(folder, content["layout"], layout_of(scope))
    pilot = Pilot(scope, content["algorithm"], content["hidden"])
    for name, controller in _controllers(pilot):
        file = folder / f"{name}.safetensors"
        try:
            controller.load(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UsageError(
                f"{file} does not hold the {name} controller that {DESCRIPTION} describes "
                f"({first}); give the folder of another policy"
            ) from error
    return pilot


def check_policy(path: Path, scope: Scope, strategy: str) -> None:
    """Refuse a policy that does not fit, before anything is measured; see `load_policy`."""
    folder = _folder(path, strategy)
    _require_layout(folder, _description(folder)["layout"], layout_of(scope))


def _folder(path: Path, strategy: str) -> Path:
    inside = path.joinpath(*INSIDE_A_RUN, f"{strategy}-policy")
    folder = inside if (inside / DESCRIPTION).exists() else path
    if not (folder / DESCRIPTION).exists():
        raise UsageError(
            f"{path} holds no policy of {strategy!r} (there is no {DESCRIPTION}); give the folder "
            f"of a run with --strategy {strategy}, or the policy's own folder"
        )
    return folder


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from error
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or content.get("version") != VERSION:
        raise UsageError(f"{path} is not a policy of this version of bitfront")
    hidden = content.get("hidden")
    if content.get("algorithm") not in ALGORITHMS or not isinstance(hidden, int) or hidden < 1:
        raise UsageError(f"{path} names no algorithm of {', '.join(ALGORITHMS)} and its size")
    if not isinstance(content.get("layout"), dict):
        raise UsageError(f"{path} does not say what its controllers see")
    return dict(content)


def _require_layout(
    folder: Path, found: dict[str, list[str]], wanted: dict[str, list[str]]
) -> None:
    for what in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(what, []), wanted.get(what, [])
        if theirs != ours:
            raise UsageError(
                f"the policy in {folder} has another layout: its {what} has {len(theirs)} fields, "
                f"this strategy's has {len(ours)} "
                f"({_difference(theirs, ours)}); train one with this version and strategy"
            )


def _difference(theirs: list[str], ours: list[str]) -> str:
    lacking = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    parts = [f"lacks {', '.join(lacking)}"] * bool(lacking)
    parts += [f"has {', '.join(extra)} besides"] * bool(extra)
    return "it " + " and ".join(parts) if parts else "in another order"


def _controllers(pilot: Pilot) -> list[tuple[str, Controller]]:
    found = [("layer", pilot.layers)]
    return found if pilot.channels is None else [*found, ("channel", pilot.channels)]
