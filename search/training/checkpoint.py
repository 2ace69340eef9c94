"""Checkpoints of a training: one safetensors file, tensors and a JSON state in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quant_ops.errors import UsageError
from search.atomic import write_bytes

FORMAT, VERSION = "bitfront-checkpoint", 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint in one step.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = json.dumps({"format": FORMAT, "version": VERSION, **state})
    write_bytes(path, save(whole, metadata={"state": header}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state.

    Raises:
        UsageError: the file is no checkpoint, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the checkpoint {path} cannot be read ({error}); delete it to train from the start"
        ) from error
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise UsageError(
            f"{path} is no checkpoint of this version; delete it to train from the start"
        )
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory, "PARAMETER/NAME" to tensor."""
    return {
        f"{position}/{name}": value
        for position, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        position, _, name = key.partition("/")
        state.setdefault(int(position), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with `prefix:` before them."""
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix:`, without it."""
    start = f"{prefix}:"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
