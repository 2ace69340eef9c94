"""The log of a training: one JSON line an epoch, and its picture on the dashboard."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.journal import writing
from search.record import Record

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = dict[str, Any]
TRAINED = "training"  # fact beside a trained trial: steps, name of its log, why it stopped early
LOGS = "training"  # folder of the logs in that of the run


class TrainingLog:
    """Rows of {"step", "epoch", "loss", "rate", "mean_bits", ...}, in steps' order.

    Args:
        path: of the JSON-lines file; None keeps rows in memory only.
        until: rows of later steps are dropped: a resumed training writes them again.
    """

    def __init__(self, path: Path | None, *, until: int = 0) -> None:
        self._path = path
        self.rows: list[Row] = [row for row in read_log(path) if row["step"] <= until]
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        """Append a row, on disk at once."""
        self.rows.append(row)
        if self._path is not None:
            with writing(self._path), self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_log(path: Path | None) -> list[Row]:
    """The whole rows of a log; a line that was being written when its writer died is left out."""
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def training_rows(folder: Path, record: Record, trial: int) -> list[Row]:
    """The log of a trained trial of the run in `folder`, [] of any other."""
    fact = record.facts(TRAINED).get(trial)
    return [] if fact is None else read_log(folder / LOGS / fact["log"])


def training_figure(rows: Sequence[Row], title: str) -> "go.Figure":
    """Loss and learning rate over steps, mean bit width of each layer below."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = ("loss", "learning rate", "mean bit width by layer")
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, subplot_titles=names)
    steps = [row["step"] for row in rows]
    for place, key in enumerate(("loss", "rate"), start=1):
        values = [row[key] for row in rows]
        figure.add_trace(go.Scatter(x=steps, y=values, name=key), row=place, col=1)
    for layer in rows[0]["mean_bits"] if rows else ():
        values = [row["mean_bits"][layer] for row in rows]
        figure.add_trace(go.Scatter(x=steps, y=values, name=layer), row=3, col=1)
    figure.update_xaxes(title_text="step", row=3, col=1)
    figure.update_layout(title=title, template="plotly_white", height=720)
    return figure
