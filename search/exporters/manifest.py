"""artefact.json: what an exported folder holds, for `search verify` and for the user's program."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quant_ops.errors import VerificationError
from search.atomic import write_text
from search.exporters.base import Companions, Promise

NAME = "artefact.json"
VECTORS = "vectors.safetensors"
FORMAT, VERSION = "bitfront-artefact", 1
_LARGEST = 2**22  # characters of a manifest


@dataclass(frozen=True)
class Manifest:
    """What was read from artefact.json; files were compared with their digests."""

    target: str
    digest: str
    promise: Promise
    files: Mapping[str, int]
    contents: Mapping[str, Any]


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file of the folder but the companions, by its path inside it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in names.items() if name not in (NAME, VECTORS)}


def write_manifest(
    target: str,
    promise: Promise,
    folder: Path,
    digest: str,
    companions: Companions,
    facts: Mapping[str, Any],
) -> None:
    """Describe the files of `folder`, which are all there but this one."""
    preprocessing = companions.preprocessing
    files = {
        name: {"bytes": size, "blake2b": _digest(folder / name)}
        for name, size in {**file_sizes(folder), VECTORS: 0}.items()
    }
    files[VECTORS]["bytes"] = (folder / VECTORS).stat().st_size
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "target": target,
        "packed_digest": digest,
        **companions.origin,
        "assignment": dict(companions.assignment),
        "class_names": list(companions.class_names),
        "preprocessing": None if preprocessing is None else asdict(preprocessing),
        "tolerance": promise.tolerance,
        "exactness": promise.text,
        "facts": dict(facts),
        "files": files,
    }
    write_text(folder / NAME, json.dumps(contents, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read artefact.json and compare every file with it.

    Raises:
        VerificationError: it is absent, damaged, or a file differs from what it says.
    """
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationError(
            f"{folder} is no exported artefact: {NAME} cannot be read ({error})"
        ) from error
    try:
        contents = json.loads(text) if len(text) <= _LARGEST else None
        assert isinstance(contents, dict)
        assert (contents["format"], contents["version"]) == (FORMAT, VERSION)
        target, digest = str(contents["target"]), str(contents["packed_digest"])
        promise = Promise(float(contents["tolerance"]), str(contents["exactness"]))
        files = {
            str(name): (int(entry["bytes"]), str(entry["blake2b"]))
            for name, entry in contents["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
        raise VerificationError(
            f"{path} is not a manifest of {FORMAT} version {VERSION}; export the model again"
        ) from e
    for name, (size, digest_of_file) in files.items():
        _check_file(folder, name, size, digest_of_file)
    sizes = {name: size for name, (size, _) in files.items() if name != VECTORS}
    return Manifest(target, digest, promise, sizes, contents)


def _check_file(folder: Path, name: str, size: int, digest: str) -> None:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\\" in name or not inside.parts:
        raise VerificationError(f"{folder / NAME} names {name!r}, which is outside the artefact")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise VerificationError(f"{folder} lacks the file {name}; export the model again")
    if path.stat().st_size != size or _digest(path) != digest:
        raise VerificationError(
            f"{path} is not the file that was exported ({size:,} bytes then, "
            f"{path.stat().st_size:,} now, or other content); copy or export it again"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
