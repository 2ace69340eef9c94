"""What recovery did, as printed text and for --json."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from search.budget import format_size
from search.evaluation import Evaluation
from search.recovery import Step


def recovery_to_dict(evaluation: Evaluation, steps: Sequence[Step]) -> dict[str, Any]:
    """One recovered trial, its parent and its steps."""
    return {
        "trial": evaluation.trial,
        "parent": evaluation.parent,
        "loss": evaluation.loss,
        "steps": [step.to_json() for step in steps],
    }


def print_recovery(evaluation: Evaluation, steps: Sequence[Step], console: Console) -> None:
    """What each step of one recovery gained."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "loss", "change", "95 % interval", "kept", "seconds"):
        table.add_column(title, justify="left" if title == "step" else "right")
    for number, step in enumerate(steps):
        low, high = step.interval
        moved = (f"{step.change:+.5f}", f"{low:+.5f} to {high:+.5f}") if number else ("", "")
        kept = "yes" if step.kept else "no"
        table.add_row(step.name, f"{step.loss:.5f}", *moved, kept, f"{step.seconds:.1f}")
    console.print(table)
    console.print(f"trial {evaluation.trial}: trial {evaluation.parent} recovered")


def print_recoveries(found: Sequence[tuple[Evaluation, Sequence[Step]]], console: Console) -> None:
    """One row a recovered trial: the loss before, and the change that each step brought.

    A change in brackets was clearly for the worse and is not in the model.
    """
    if not found:
        return
    names = max((_titles(steps) for _, steps in found), key=len)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("recovered", "of", "size", *names, "after"):
        table.add_column(title, justify="right", no_wrap=True)
    for evaluation, steps in found:
        cells = [f"{steps[0].loss:.4g}"] if steps else []
        cells += [f"{s.change:+.2g}" if s.kept else f"({s.change:+.2g})" for s in steps[1:]]
        cells += [""] * (len(names) - len(cells))
        size = format_size(evaluation.size_bytes)
        table.add_row(
            str(evaluation.trial), str(evaluation.parent), size, *cells, f"{evaluation.loss:.4g}"
        )
    console.print(table)


def _titles(steps: Sequence[Step]) -> list[str]:
    return ["before", *(step.name for step in steps[1:])]
