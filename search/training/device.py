"""Where training runs."""

import torch

from quant_ops.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


def training_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one.

    Raises:
        UsageError: a GPU is wanted and there is none, or there is no such name.
    """
    if name not in DEVICES:
        raise UsageError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")
