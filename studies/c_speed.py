"""The C export of a run's point beside ONNX Runtime: batch 1, one thread, ratios within one run.

    python studies/c_speed.py RUN --best 140kB --data DATA

Compared are the exported library (all kernels that the processor has, AVX2 alone, portable), ONNX
Runtime's own int8 model of the same float network (onnxruntime.quantization: static, QDQ, weights
per channel, 8-bit activations), and the float network in ONNX Runtime. Rounds are interleaved;
ratios are those of the first deciles, since other work on the machine only ever adds. Every output
integer of the library on all validation images is compared with the code-domain reference.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from row_file import RowFile

from quant_ops.candidate import Candidate
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from quant_ops.quantized import QuantizedModel
from quant_ops.reference import run_torch
from search.config import read_config
from search.export import choose_trial
from search.exporters.c.compiler import LoadedLibrary, compile_c, sections
from search.exporters.c.project import DESCRIPTION, generate
from search.exporters.onnx_runtime import onnx_bytes
from search.finish import pack_trial
from search.prepare import Prepared, prepare
from search.tasks.table import load_task

ROWS = RowFile("c_speed")
ROUNDS, CALIBRATION = 400, 256
Timed = Callable[[], Any]


def main() -> None:
    """Measure, print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--best")
    parser.add_argument("--trial", type=int)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    config, _ = read_config(arguments.run)
    folder = arguments.data or config.data
    task = load_task(config.task, data=Path(folder) if folder else None)
    prepared = prepare(task, config)
    evaluation = choose_trial(arguments.run, trial=arguments.trial, best=arguments.best)
    packed = pack_trial(prepared, evaluation, arguments.run)
    row: dict[str, Any] = {"task": task.name, "date": str(date.today())}
    row |= {"processor": processor(), "packed_bytes": packed.size_bytes}
    with tempfile.TemporaryDirectory() as scratch:
        row |= measured(prepared, packed, Path(scratch))
    ROWS.append(row)
    for key, value in row.items():
        print(f"{key:32} {value}")


def processor() -> str:
    """Its name, as far as the system tells."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def measured(prepared: Prepared, packed: PackedModel, scratch: Path) -> dict[str, Any]:
    """Equality, memory and times."""
    library = generate(packed, "network")
    library.write(scratch)
    facts = json.loads(library.files[DESCRIPTION])
    sources = [scratch / "network.c"]
    levels = {}
    for name, level in (("portable", 0), ("avx2", 1), ("c", 9)):  # an object each: static memory
        shared = scratch / f"{name}.so"
        compile_c(sources, shared, ("-O3", "-shared", "-fPIC"))
        levels[name] = LoadedLibrary(shared, facts, level)
    compile_c(sources, scratch / "network.o", ("-c", "-O3"))
    found = sections(scratch / "network.o")
    assert found is not None
    out: dict[str, Any] = {
        "level": levels["c"].level,
        "constants": found.constants,
        "constants_allowed": int(1.03 * packed.size_bytes + 8000),
        "ram": found.ram,
        "ram_predicted": library.source.x86_ram_bytes,
        "ram_portable": library.source.ram_bytes,
    }
    out |= compared(prepared, packed, levels["c"])
    sample = prepared.spec.splits["validation"].batches[0][0][0][:1].numpy()
    at = [sample.ctypes.data]
    runs: dict[str, Timed] = {name: (lambda lib=lib: lib.infer(at)) for name, lib in levels.items()}
    for name, path in onnx_models(prepared, packed, scratch).items():
        session = one_thread(path)
        feed = {session.get_inputs()[0].name: sample}
        runs[name] = lambda session=session, feed=feed: session.run(None, feed)
    times = interleaved(runs)
    out |= {f"{name}_us": round(1e6 * t, 1) for name, t in times.items()}
    for name in ("c", "avx2", "portable"):
        out[f"{name}_beside_int8"] = round(times["onnx_int8"] / times[name], 3)
        out[f"{name}_beside_float"] = round(times["onnx_float"] / times[name], 3)
    return out


def compared(prepared: Prepared, packed: PackedModel, library: LoadedLibrary) -> dict[str, Any]:
    """Output integers on all validation images beside the reference's."""
    program = lower(packed.model)
    total = differ = 0
    for inputs, _ in prepared.spec.splits["validation"].batches:
        arrays = [x.numpy() for x in inputs]
        wanted = run_torch(program, arrays).integers
        for mine, theirs in zip(library.integers(arrays), wanted, strict=True):
            assert theirs is not None
            total, differ = total + mine.size, differ + int((mine != theirs).sum())
    return {"integers_compared": total, "integers_that_differ": differ}


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The first calibration images, one by one."""

    def __init__(self, name: str, batches: Sequence[Any]) -> None:
        self.samples = self._samples(name, batches)

    def _samples(self, name: str, batches: Sequence[Any]) -> Iterator[dict[str, Any]]:
        n = 0
        for inputs, _ in batches:
            for image in inputs[0].numpy():
                if n == CALIBRATION:
                    return
                n += 1
                yield {name: image[None]}

    def get_next(self) -> dict[str, Any] | None:
        """The next feed."""
        return next(self.samples, None)


def onnx_models(prepared: Prepared, packed: PackedModel, scratch: Path) -> dict[str, Path]:
    """The float network, and ONNX Runtime's own int8 version of it."""
    traced = prepared.traced
    plain = QuantizedModel(traced.graph, Candidate((), ()), {}, {}, dict(traced.params))
    paths = {name: scratch / f"{name}.onnx" for name in ("onnx_float", "onnx_ready", "onnx_int8")}
    paths["onnx_float"].write_bytes(onnx_bytes(plain, {}))
    quant_pre_process(str(paths["onnx_float"]), str(paths["onnx_ready"]))
    name = one_thread(paths["onnx_float"]).get_inputs()[0].name
    quantize_static(
        str(paths["onnx_ready"]),
        str(paths["onnx_int8"]),
        Images(name, prepared.spec.splits["calibration"].batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    del paths["onnx_ready"]
    return paths


def one_thread(path: Path) -> Any:
    """A session that uses one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved(runs: dict[str, Timed]) -> dict[str, float]:
    """First decile of the seconds of each; the slowest takes part in every tenth round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(ROUNDS):
        for name, run in runs.items():
            if name == "portable" and round_number % 10:
                continue
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    return {name: float(np.quantile(times, 0.1)) for name, times in taken.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
