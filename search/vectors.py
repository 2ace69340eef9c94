"""Test vectors that travel beside a packed file: real inputs and the outputs it must give.

They are a file of their own (FILE.vectors.safetensors), so that the packed file stays as small
as the search said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils import _pytree as pytree

from quant_ops.errors import VerificationError
from quant_ops.packed import PackedModel
from search.atomic import write_bytes
from search.finish import runner_of

N_VECTORS = 32
# Float kernels of two machines differ in the last bits; a wrong code moves outputs far more.
TOLERANCE = 1e-4
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Vectors:
    """Inputs of up to `N_VECTORS` samples and the flat outputs of the packed model.

    `own` are the outputs of a target that has a rounding of its own, empty for the others.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    digest: str
    own: tuple[Tensor, ...] = ()

    def save(self, path: Path) -> None:
        """Write to `path`."""
        tensors = {f"input.{i}": x.contiguous() for i, x in enumerate(self.inputs)}
        tensors |= {f"output.{i}": x.contiguous() for i, x in enumerate(self.outputs)}
        tensors |= {f"own.{i}": x.contiguous() for i, x in enumerate(self.own)}
        metadata = {"format": "bitfront-vectors", "digest": self.digest}
        write_bytes(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: Path, digest: str) -> "Vectors":
        """Read `path`.

        Raises:
            VerificationError: not readable as test vectors.
        """
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise VerificationError(f"{path} holds no test vectors: {error}") from error
        inputs, outputs, own = (_numbered(tensors, kind) for kind in ("input", "output", "own"))
        if not inputs or not outputs or len(own) not in (0, len(outputs)):
            raise VerificationError(f"{path} holds no test vectors")
        return cls(inputs, outputs, digest, own)


def _numbered(tensors: Mapping[str, Tensor], kind: str) -> tuple[Tensor, ...]:
    keys = [key for key in tensors if key.startswith(f"{kind}.")]
    return tuple(tensors[key] for key in sorted(keys, key=lambda key: (len(key), key)))


def vectors_path(packed: Path) -> Path:
    """Where the vectors of a packed file lie."""
    return packed.with_name(f"{packed.stem}.vectors.safetensors")


def make_vectors(packed: PackedModel, inputs: Sequence[Tensor]) -> Vectors:
    """Run the packed model on the first samples of `inputs`."""
    first = tuple(x[:N_VECTORS] for x in inputs)
    return Vectors(first, tuple(run_packed(packed, first)), packed.digest)


def largest_difference(packed: PackedModel, vectors: Vectors) -> float:
    """Largest absolute difference of any output, over the largest stored magnitude.

    Infinite where an output is not a number.

    Raises:
        VerificationError: the model cannot take the inputs, or has other outputs.
    """
    outputs = run_packed(packed, vectors.inputs)
    if len(outputs) != len(vectors.outputs):
        raise VerificationError(
            f"the file has {len(outputs)} outputs, its test vectors have {len(vectors.outputs)}"
        )
    worst = 0.0
    for mine, stored in zip(outputs, vectors.outputs, strict=True):
        if mine.shape != stored.shape:
            raise VerificationError(
                f"the file gives outputs of shape {tuple(mine.shape)}, its test vectors hold "
                f"{tuple(stored.shape)}"
            )
        scale = max(float(stored.abs().max()), TINY)
        difference = float((mine - stored).abs().max()) / scale
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def run_packed(packed: PackedModel, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Flat outputs of the referee (`search.finish.runner_of`)."""
    with torch.inference_mode():
        leaves, _ = pytree.tree_flatten(runner_of(packed)(inputs))
    return [leaf.clone() for leaf in leaves]
