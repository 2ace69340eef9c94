"""The distortion table of a network: time and rank of every measure, all in one run.

    python studies/distortion.py --data DATA [--task cifar10-resnet20] [--samples 1024]

Plain: whole-network evaluations one by one, weights quantized beforehand, the first half before
and the second half after everything else. Exact: the same cells, what they have in common computed
once. The others are predicted from gradients (`--distortion`) on fewer images.
"""

import argparse
import time
from datetime import date
from pathlib import Path

import torch
from row_file import RowFile
from scipy.stats import spearmanr

from quant_ops.candidate import Candidate
from quant_ops.perturbation import MEASURES
from search.config import RunConfig
from search.prepare import Prepared, prepare
from search.tasks.table import load_task

ROWS = RowFile("distortion")
PREDICTED_ON = (128, 256)  # images
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def main() -> None:
    """Measure, print and keep one row per measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="cifar10-resnet20")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    prepared = prepared_task(arguments)
    cells = [
        Candidate.of({choice.name: width})
        for choice in prepared.space.layers
        for width in WIDTHS
        if width in choice.bit_widths
    ]
    evaluator = prepared.evaluator
    for cell in cells:
        evaluator.bank.params(cell)
    evaluator.judge("probe")
    half = len(cells) // 2
    plain_seconds = timed(lambda: [evaluator.measure(c, "probe") for c in cells[:half]])[0]
    exact_seconds, exact = timed(lambda: evaluator.measure_many(cells, "probe"))
    losses = [m.loss for m in exact]
    found = []
    for images in PREDICTED_ON:
        data = prepared.spec.splits["probe"].first(images)
        evaluator._splits = {**evaluator._splits, "few": data}
        evaluator._judges.pop("few", None)
        for measure in MEASURES:
            seconds, predicted = timed(lambda m=measure: evaluator.predict_many(cells, m, "few"))
            found.append((measure, images, seconds, spearmanr(predicted, losses).statistic))
    plain_seconds += timed(lambda: [evaluator.measure(c, "probe") for c in cells[half:]])[0]
    rows = [("plain", arguments.samples, plain_seconds, 1.0)]
    rows += [("exact", arguments.samples, exact_seconds, 1.0), *found]
    print(f"{len(cells)} cells of {arguments.task}, {torch.get_num_threads()} threads")
    print("| measure | images | seconds | faster than plain | than exact | rank correlation |")
    print("|---|---|---|---|---|---|")
    for measure, images, seconds, rank in rows:
        print(
            f"| {measure} | {images} | {seconds:.1f} | {plain_seconds / seconds:.2f}x "
            f"| {exact_seconds / seconds:.2f}x | {rank:.4f} |"
        )
        row = {
            "task": arguments.task,
            "date": str(date.today()),
            "cells": len(cells),
            "threads": arguments.threads,
            "measure": measure,
            "images": images,
            "seconds": round(seconds, 2),
            "rank": round(float(rank), 4),
        }
        ROWS.append(row)


def prepared_task(arguments: argparse.Namespace) -> Prepared:
    """The task, every sample of the table in its probe split."""
    config = RunConfig(
        task=arguments.task,
        data=str(arguments.data),
        probe_samples=arguments.samples,
        threads=arguments.threads,
    )
    return prepare(load_task(arguments.task, data=arguments.data), config)


def timed(function):
    """(seconds, result)."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
