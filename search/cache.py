"""Weights that were trained once, kept in the user's cache folder."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(f"bitfront.{__name__}")


def cache_folder() -> Path:
    """BITFRONT_CACHE if set, else the folder the operating system keeps for caches."""
    chosen = os.environ.get("BITFRONT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("bitfront"))


def weights_path(name: str, recipe: Mapping[str, object]) -> Path:
    """Where the weights of `recipe` lie; any other recipe has another path."""
    canonical = json.dumps(recipe, sort_keys=True, default=str)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return cache_folder() / "weights" / f"{name}-{digest}.safetensors"


def cached_weights(
    name: str, recipe: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The weights of `recipe`: read if they were made before, else made and kept.

    A cache that cannot be read or written costs time, never the run: it is made again and a
    warning is logged.
    """
    path = weights_path(name, recipe)
    if path.exists():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            log.warning("the cached weights %s cannot be read (%s); making them again", path, error)
    weights = {key: tensor.detach().contiguous() for key, tensor in make().items()}
    try:
        _write_whole(path, weights)
    except (SafetensorError, OSError) as error:
        log.warning(
            "the weights could not be kept in %s (%s), so the next run makes them again; "
            "set BITFRONT_CACHE to a folder that can be written",
            path.parent,
            error,
        )
    return weights


def _write_whole(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write under another name, then rename: a reader sees all of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(dict(weights), temporary)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
