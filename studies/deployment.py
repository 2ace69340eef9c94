"""One packed file on every target beside its referee, image by image, on a whole split.

    python studies/deployment.py FILE --data DATA --images 500     # of validation
    python studies/deployment.py FILE --data DATA --test           # once
    python studies/deployment.py --table

Of each image: every output integer of the C library (all kernels, and AVX2 alone) against the
referee's; every output of ONNX Runtime against the referee in ONNX Runtime's rounding, bit for bit,
and against the normative one, where top classes may change; every output and activation code of
ONNX Runtime in exact arithmetic against the referee (the first 1,000); every output of the
torch.export program (slow: the first 1,000) against the reference of the reduced model. How many
activation codes the rounding changes is counted twice: as they come out of the network, and step by
step from equal inputs (the first 1,000). A row is kept per target and 500 images; what is there is
not done again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from row_file import RowFile
from torch import Tensor

from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.reduced import reduced_model
from quant_ops.reference import run_torch
from quant_ops.runtime_mode import changed_codes, run_runtime_mode
from search.data import load_split
from search.exporters.base import Companions, Runner
from search.exporters.c.compiler import LoadedLibrary, compile_c
from search.exporters.c.project import DESCRIPTION, generate
from search.exporters.onnx_graph.network import with_codes, write_network
from search.exporters.onnx_runtime import OnnxExporter, runner_of
from search.exporters.torch_program import TorchExporter
from search.tasks.table import load_task
from search.vectors import Vectors

ROWS = RowFile("deployment")
CHUNK, FEW = 500, 1000
Row = dict[str, Any]
Measure = Callable[[Tensor, Tensor], Row]


def main() -> None:
    """Measure what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--task", default="cifar10-resnet20")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--targets", default="c,onnx,exact,steps,torch")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--test", action="store_true", help="the test split, not validation")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    torch.set_num_threads(1)
    task = load_task(arguments.task, data=arguments.data)
    packed = PackedModel.load(arguments.file)
    what = "test" if arguments.test else "validation"
    split = load_split(task.test() if arguments.test else task.validation, what=what, batch=CHUNK)
    kept = {(row["digest"], row["split"], row["target"], row["start"]) for row in ROWS}
    with tempfile.TemporaryDirectory() as scratch:
        for target in arguments.targets.split(","):
            measure: Measure | None = None
            for start, (images, labels) in chunks(split.batches, target, arguments.images):
                if (packed.digest, what, target, start) in kept:
                    continue
                measure = measure or MEASURES[target](packed, images, Path(scratch))
                began = time.process_time()
                row = {"digest": packed.digest, "bytes": packed.size_bytes, "split": what}
                row |= {"target": target, "start": start, "images": len(images)}
                row |= measure(images, labels)
                row |= {"cpu_seconds": round(time.process_time() - began, 1)}
                keep({**row, "date": str(date.today())})


def chunks(
    batches: Sequence[Any], target: str, at_most: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Batches with the number of their first image; few for what is slow."""
    start = 0
    for (images,), labels in batches:
        if start < at_most and (start < FEW or target in ("c", "onnx")):
            yield start, (images, labels)
        start += len(images)


def keep(row: Row) -> None:
    """Append a row."""
    ROWS.append(row)
    print({key: row[key] for key in ("split", "target", "start", "cpu_seconds")}, flush=True)


def c_measure(packed: PackedModel, images: Tensor, scratch: Path) -> Measure:
    """Output integers of the library at two levels, and what the referee's accuracy is."""
    library, program = generate(packed, "network"), lower(packed.model)
    library.write(scratch / "c")
    facts = json.loads(library.files[DESCRIPTION])
    loaded = {}
    for name, level in (("avx2", 1), ("c", 9)):  # an object each: static memory
        shared = scratch / f"{name}.so"
        compile_c([scratch / "c/network.c"], shared, ("-O3", "-shared", "-fPIC"))
        loaded[name] = LoadedLibrary(shared, facts, level)

    def measure(images: Tensor, labels: Tensor) -> Row:
        (wanted,) = run_torch(program, [images.numpy()]).integers
        assert wanted is not None
        row: Row = {"integers": wanted.size, "level": loaded["c"].level}
        row["reference_right"] = right(wanted, labels)
        for name, runs in loaded.items():
            (mine,) = runs.integers([images.numpy()])
            row[f"{name}_differ"] = int((mine != wanted).sum())
        return row

    return measure


def onnx_measure(packed: PackedModel, images: Tensor, scratch: Path) -> Measure:
    """Against the mode bit for bit, against the normative reference by class and by code."""
    exporter, program = OnnxExporter(), lower(reduced_model(packed.model))
    runner = exported(exporter, packed, images, scratch / "onnx")
    edges = [name for name, number in program.edges.items() if number not in program.outputs]

    def measure(images: Tensor, labels: Tensor) -> Row:
        arrays = [images.numpy()]
        mode = run_runtime_mode(program, arrays, edges)
        reference = run_torch(program, arrays, edges)
        mine = next(iter(runner([images]))).numpy()
        (wanted,), (expected,) = reference.values, mode.values
        shares = [float((mode.codes[e] != reference.codes[e]).mean()) for e in edges]
        changed = mine.argmax(1) != wanted.argmax(1)
        top = np.sort(wanted[changed], axis=1)
        return {
            "outputs": mine.size,
            "outputs_that_differ_from_the_mode": int((mine != expected).sum()),
            "right": right(mine, labels),
            "reference_right": right(wanted, labels),
            "margins_of_changed": (top[:, -1] - top[:, -2]).tolist(),
            "largest_difference": float(np.abs(mine - wanted).max()),
            "shares": dict(zip(edges, shares, strict=True)),
        }

    return measure


def exact_measure(packed: PackedModel, images: Tensor, scratch: Path) -> Measure:
    """Exact arithmetic against the normative reference: outputs, and the codes of all edges."""
    model = reduced_model(packed.model)
    program = lower(model)
    runner = exported(OnnxExporter("exact"), packed, images, scratch / "exact")
    written = write_network(model, program, exact=True)
    with_edges = runner_of(with_codes(written).SerializeToString(), scratch)
    edges = list(written.codes)

    def measure(images: Tensor, labels: Tensor) -> Row:
        reference = run_torch(program, [images.numpy()], edges)
        (wanted,) = reference.values
        mine = next(iter(runner([images]))).numpy()
        codes = with_edges([images])[len(program.outputs) :]
        differ = 0
        for edge, found in zip(edges, codes, strict=True):
            meaning = program.codes[program.edges[edge]]
            assert meaning is not None
            differ += int((found.numpy() + np.int32(meaning.low) != reference.codes[edge]).sum())
        return {
            "outputs": mine.size,
            "outputs_that_differ": int((mine != wanted).sum()),
            "codes": sum(reference.codes[edge].size for edge in edges),
            "codes_that_differ": differ,
            "right": right(mine, labels),
        }

    return measure


def steps_measure(packed: PackedModel, images: Tensor, scratch: Path) -> Measure:
    """Share of each step's codes that ONNX Runtime's rounding changes, from equal inputs."""
    program = lower(reduced_model(packed.model))

    def measure(images: Tensor, labels: Tensor) -> Row:
        return {"steps": changed_codes(program, [images.numpy()])}

    return measure


def torch_measure(packed: PackedModel, images: Tensor, scratch: Path) -> Measure:
    """The torch.export program against the reference of the reduced model."""
    exporter = TorchExporter()
    runner = exported(exporter, packed, images, scratch / "torch")

    def measure(images: Tensor, labels: Tensor) -> Row:
        mine = next(iter(runner([images])))
        wanted = next(iter(exporter.expected(packed, [images])))
        differ = int((mine != wanted).sum())
        return {"outputs": mine.numel(), "outputs_that_differ": differ}

    return measure


MEASURES = {
    "c": c_measure,
    "onnx": onnx_measure,
    "exact": exact_measure,
    "steps": steps_measure,
    "torch": torch_measure,
}


def exported(
    exporter: OnnxExporter | TorchExporter, packed: PackedModel, images: Tensor, folder: Path
) -> Runner:
    """What `search export` would write, opened."""
    folder.mkdir()
    few = (images[:4],)
    vectors = Vectors(few, tuple(exporter.expected(packed, few)), packed.digest)
    exporter.write(packed, folder, Companions(vectors))
    return exporter.open(folder)


def right(scores: NDArray[Any], labels: Tensor) -> int:
    """Images whose first largest score is the label's."""
    return int((scores.argmax(1) == labels.numpy()).sum())


def print_table() -> None:
    """Sums over the rows of each file, split and target."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in ROWS:
        groups.setdefault((row["digest"], row["split"], row["target"]), []).append(row)
    for (digest, split, target), found in groups.items():
        images = sum(row["images"] for row in found)
        print(f"{digest[:8]} ({found[0]['bytes']:,} bytes), {split}, {target}: {images:,} images")
        for name in COUNTS:
            if name in found[0]:
                print(f"  {name}: {sum(row[name] for row in found):,}")
        if target == "onnx":
            print_changes(found)
        if target == "steps":
            worst = {edge: max(row["steps"][edge] for row in found) for edge in found[0]["steps"]}
            edge = max(worst, key=lambda name: worst[name][0])
            print(f"  largest share of a step's codes: {worst[edge][0]:.2e} at {edge}")
            print(f"  by at most {max(by for _, by in worst.values())}")


COUNTS = (
    "integers", "c_differ", "avx2_differ", "outputs", "outputs_that_differ_from_the_mode",
    "outputs_that_differ", "codes", "codes_that_differ", "right", "reference_right",
)  # fmt: skip


def print_changes(found: list[Row]) -> None:
    """Top classes that change, and the codes on the way there."""
    margins = [margin for row in found for margin in row["margins_of_changed"]]
    largest = max(row["largest_difference"] for row in found)
    beyond = sum(margin >= largest for margin in margins)
    print(
        f"  top classes that change: {len(margins)}, largest margin {max(margins, default=0):.4g}"
    )
    print(f"  largest difference of a logit: {largest:.4g}; changed beyond it: {beyond}")
    weights = [row["images"] for row in found]
    for edge in found[0]["shares"]:
        share = np.average([row["shares"][edge] for row in found], weights=weights)
        print(f"    {edge}: {100 * share:.2f} % of the codes differ")


if __name__ == "__main__":
    main()
