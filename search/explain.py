"""Why a trial looks as it does: per layer its sparsity, its widths, and the ranking behind them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from quant_ops.errors import UsageError
from search.budget import format_size
from search.config import read_config
from search.evaluation import Evaluation
from search.record import Record

QUARTERS = 4


@dataclass(frozen=True, slots=True)
class LayerStory:
    """What was decided for one layer.

    Attributes:
        name: of the layer.
        widths: bit width of every output channel, or one for all of them.
        channels: output channels; None where all have one width and nobody ranked them.
        ranking: channels from the least important to the most important one; empty if unknown.
    """

    name: str
    widths: tuple[float, ...]
    channels: int | None
    ranking: tuple[int, ...]

    @property
    def sparsity(self) -> float:
        """Share of the channels at 0 bits."""
        return sum(w == 0 for w in self.widths) / len(self.widths)

    @property
    def histogram(self) -> dict[float, int]:
        """Bit width to number of channels, ascending."""
        whole = self.channels if len(self.widths) == 1 and self.channels else 1
        counts = Counter(self.widths)
        return {width: counts[width] * whole for width in sorted(counts)}

    @property
    def by_importance(self) -> tuple[float, ...]:
        """Mean width of the least important quarter of the channels, of the next, and so on."""
        if not self.ranking:
            return ()
        ranked = [self.widths[c] if len(self.widths) > 1 else self.widths[0] for c in self.ranking]
        parts = np.array_split(np.array(ranked), min(QUARTERS, len(ranked)))
        return tuple(round(float(part.mean()), 2) for part in parts)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "layer": self.name,
            "sparsity": self.sparsity,
            "widths": {f"{width:g}": n for width, n in self.histogram.items()},
            "mean_width_by_importance": list(self.by_importance),
            "ranking": list(self.ranking),
        }


@dataclass(frozen=True, slots=True)
class Story:
    """A trial explained."""

    evaluation: Evaluation
    criterion: str
    layers: tuple[LayerStory, ...]

    def to_json(self) -> dict[str, Any]:
        """What `search show --trial N --json` prints."""
        e = self.evaluation
        return {
            "trial": e.trial,
            "strategy": e.strategy,
            "loss": e.loss,
            "size_bytes": e.size_bytes,
            "importance": self.criterion or None,
            "layers": [layer.to_json() for layer in self.layers],
        }


def explain(folder: Path, trial: int) -> Story:
    """The story of one trial of the run in `folder`.

    Raises:
        UsageError: there is no such run or trial.
    """
    config, _ = read_config(folder)
    evaluations = {e.trial: e for e in Record.open(folder, storage=config.storage).evaluations()}
    if trial not in evaluations:
        raise UsageError(
            f"{folder} has no trial {trial}; it has {len(evaluations)}, and `search show {folder}` "
            f"lists those of the front"
        )
    evaluation = evaluations[trial]
    criterion, channels = _ranking(folder, evaluation.strategy)
    stories = []
    for name, quant in evaluation.candidate.layers:
        scores = channels.get(name, ())
        order = tuple(int(c) for c in np.argsort(np.array(scores), kind="stable"))
        n = len(scores) or (len(quant.bit_widths) if len(quant.bit_widths) > 1 else None)
        stories.append(LayerStory(name, quant.bit_widths, n, order))
    return Story(evaluation, criterion, tuple(stories))


def print_story(story: Story, console: Console) -> None:
    """One row per layer."""
    e = story.evaluation
    console.print(
        f"trial {e.trial} by {e.strategy}: {format_size(e.size_bytes)}, loss {e.loss:.4g}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("channels", justify="right")
    table.add_column("pruned", justify="right")
    table.add_column("channels per bit width")
    if story.criterion:
        table.add_column(f"mean bits by {story.criterion}, least to most")
    for layer in story.layers:
        widths = "  ".join(f"{width:g}: {n}" for width, n in layer.histogram.items())
        if layer.channels is None:
            widths = f"{layer.widths[0]:g}: all"
        row = [layer.name, str(layer.channels or "-"), f"{100 * layer.sparsity:.0f} %", widths]
        if story.criterion:
            row.append("  ".join(f"{width:.1f}" for width in layer.by_importance))
        table.add_row(*row)
    console.print(table)
    if not story.criterion:
        console.print(f"{e.strategy} ranks no channels, so no importance is shown", style="dim")


def _ranking(folder: Path, strategy: str) -> tuple[str, Mapping[str, Sequence[float]]]:
    """Criterion and layer name to the importance of its channels, where the strategy kept one."""
    path = folder / "checkpoints" / "agents" / f"{strategy}-importance.json"
    if not path.exists():
        return "", {}
    content = json.loads(path.read_text())
    return content["criterion"], content["channels"]
