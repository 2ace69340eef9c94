"""front.html: one self-contained page with the front, the metric and the bit widths."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from search.atomic import write_text
from search.budget import format_size
from search.evaluation import Evaluation
from search.front import TRAINED_FRONT, ParetoFront
from search.intervals import Z95
from search.plots import (
    BASELINE_STYLES,
    BIT_COLORS,
    BUDGET_COLOR,
    FLOAT_COLOR,
    FRONT_COLOR,
    width_table,
)
from search.point_row import cell_texts, point_row
from search.trial_codec import widths_to_text

_SYMBOLS = {"uniform": "square", "rate-distortion": "triangle-up"}
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"


def save_html(front: ParetoFront, path: Path) -> None:
    """Write the page; it needs no network.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    page = interactive_figure(front).to_html(
        include_plotlyjs=True, full_html=True, config={"displaylogo": False, "responsive": True}
    )
    title = f"<head><title>{front.info.task} - bitfront</title>"
    write_text(path, page.replace("<head>", title, 1))


def interactive_figure(front: ParetoFront) -> go.Figure:
    """Loss and metric over size above, bit width per layer and point below."""
    names, widths = width_table(front.points)
    heat_height = max(220, 17 * len(names) + 60)
    top_height = 430
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        row_heights=[top_height, heat_height],
        vertical_spacing=95 / (top_height + heat_height),
        horizontal_spacing=0.09,
        subplot_titles=("quality loss", front.info.metric, "bit width per layer and point"),
    )
    _add_curves(figure, front)
    if front.points:
        figure.add_trace(bits_trace(front.points, names, widths), row=2, col=1)
        figure.update_yaxes(autorange="reversed", tickfont_size=10, dtick=1, row=2, col=1)
        figure.update_xaxes(tickangle=-60, tickfont_size=10, row=2, col=1)
    figure.update_layout(
        template="plotly_white",
        height=top_height + heat_height + 230,
        font_family=_FONT,
        title={
            "text": f"{front.info.task}: {len(front.points)} points from "
            f"{format_size(front.info.float_size_bytes)} in float32",
            "y": 0.985,
            "yanchor": "top",
        },
        legend={"orientation": "h", "yref": "container", "y": 0.955, "yanchor": "top", "x": 0},
        hoverlabel={"align": "left", "font_family": _FONT},
        margin={"t": 115, "l": 80, "r": 30, "b": 110},
    )
    return figure


def bits_trace(
    points: Sequence[Evaluation],
    names: Sequence[str],
    widths: NDArray[np.float64],
) -> go.Heatmap:
    """Heat map of bit widths; columns are labelled with trial and size."""
    values = [[None if np.isnan(width) else float(width) for width in row] for row in widths]
    return go.Heatmap(
        x=[f"#{e.trial} · {format_size(e.size_bytes)}" for e in points],
        y=list(names),
        z=values,
        text=[[_cell(width) for width in row] for row in widths],
        texttemplate="%{text}",
        zmin=0,
        zmax=8,
        colorscale=[(i / 8, color) for i, color in enumerate(BIT_COLORS)],
        colorbar={
            "title": "bits",
            "len": 0.35,
            "y": 0,
            "yanchor": "bottom",
            "tickvals": [*range(9)],
        },
        xgap=1,
        ygap=1,
        hovertemplate="%{y}<br>%{x}<br>%{z} bits<extra></extra>",
        showscale=True,
    )


def hover_text(front: ParetoFront, evaluation: Evaluation) -> str:
    """Everything known of a point, for the mouse."""
    lines = [f"<b>{k}</b> {v}" for k, v in cell_texts(front, evaluation, every_cost=True).items()]
    widths = widths_to_text(evaluation.candidate).split(" ")
    rows = [" ".join(widths[i : i + 12]) for i in range(0, len(widths), 12)]
    return "<br>".join([*lines, "<b>weight bits</b> " + "<br>".join(rows)])


def _add_curves(figure: go.Figure, front: ParetoFront) -> None:
    info = front.info
    factor = 100 if info.percent else 1
    for name, color in ((name, style[0]) for name, style in BASELINE_STYLES.items()):
        points = [e for e in front.baselines if e.strategy == name]
        if points:
            look = {"color": color, "symbol": _SYMBOLS[name], "dash": "dot"}
            _add_pair(figure, front, points, name, look)
    for name, part in front.parts().items():
        symbol = "diamond" if name == TRAINED_FRONT else "circle"
        look = {"color": FRONT_COLOR, "symbol": symbol, "dash": "solid"}
        _add_pair(figure, front, part, name, look)
    if info.float_validation is not None:
        figure.add_trace(
            go.Scatter(
                x=[info.float_size_bytes],
                y=[factor * info.float_validation],
                mode="markers",
                name="float",
                marker={"symbol": "star", "size": 14, "color": FLOAT_COLOR},
            ),
            row=1,
            col=2,
        )
    losses = [e.loss for e in (*front.points, *front.baselines) if e.loss > 0]
    log_losses = bool(losses) and max(losses) > 20 * min(losses)
    figure.update_yaxes(
        type="log" if log_losses else "linear", exponentformat="power", row=1, col=1
    )
    figure.update_yaxes(ticksuffix=" %" if info.percent else "", row=1, col=2)
    sizes = [e.size_bytes for e in (*front.points, *front.baselines)]
    whole = [*sizes, info.float_size_bytes]
    for column, shown in ((1, sizes or whole), (2, whole)):
        _style_size_axis(figure, front, shown, column)


def size_ticks(sizes: Sequence[int]) -> list[int]:
    """Round sizes for a logarithmic axis: 1, 2, 5 times powers of ten, closer on a short one.

    >>> size_ticks([731, 800])
    [720, 735, 750, 765, 780, 795, 810]
    >>> size_ticks([900, 11_000])[:5]
    [100, 200, 500, 1000, 2000]
    """
    smallest, largest = min(sizes), max(sizes)
    if largest < 4 * smallest:
        return sorted({round(tick) for tick in MaxNLocator(6).tick_values(smallest, largest)})
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    return [m * 10**power for power in range(low, high + 1) for m in (1, 2, 5)]


def _style_size_axis(
    figure: go.Figure, front: ParetoFront, sizes: Sequence[int], column: int
) -> None:
    ticks = size_ticks([*sizes, *front.info.budgets.sizes])
    figure.update_xaxes(
        type="log", title="file size, header included", tickvals=ticks,
        ticktext=[format_size(tick).replace(".00", "") for tick in ticks], row=1, col=column,
    )  # fmt: skip
    axis = "" if column == 1 else column
    for size in front.info.budgets.sizes:
        figure.add_shape(
            type="line", x0=size, x1=size, y0=0, y1=1, xref="x", yref="y domain",
            line={"color": BUDGET_COLOR, "dash": "dash", "width": 1}, row=1, col=column,
        )  # fmt: skip
        figure.add_annotation(
            # An annotation's place on a logarithmic axis is a logarithm, a shape's is not.
            x=math.log10(size), y=0, xref=f"x{axis}", yref=f"y{axis} domain",
            text=format_size(size), textangle=-90, xanchor="right", yanchor="bottom",
            showarrow=False, font={"color": BUDGET_COLOR, "size": 11},
        )  # fmt: skip


def _add_pair(
    figure: go.Figure,
    front: ParetoFront,
    points: Sequence[Evaluation],
    name: str,
    look: dict[str, str],
) -> None:
    """One series on both axes: losses as a staircase, metrics as a line."""
    factor = 100 if front.info.percent else 1
    is_front = name == "front"
    shared = {
        "x": [e.size_bytes for e in points],
        "name": name,
        "legendgroup": name,
        "mode": "lines+markers",
        "marker": {"symbol": look["symbol"], "size": 8},
        "text": [hover_text(front, e) for e in points],
        "hovertemplate": "%{text}<extra>" + name + "</extra>",
    }
    line = {"color": look["color"], "dash": look["dash"], "width": 1.6}
    error = {
        "type": "data",
        "array": [Z95 * e.loss_stderr for e in points],
        "thickness": 1,
        "width": 0,
    }
    losses = go.Scatter(
        **shared, y=[e.loss for e in points], error_y=error if is_front else None,
        line={**line, "shape": "hv" if is_front else "linear"},
    )  # fmt: skip
    metrics = go.Scatter(
        **shared, y=[None if e.metric is None else factor * e.metric for e in points],
        line=line, showlegend=False, error_y=_metric_error(front, points) if is_front else None,
    )  # fmt: skip
    figure.add_trace(losses, row=1, col=1)
    figure.add_trace(metrics, row=1, col=2)


def _metric_error(front: ParetoFront, points: Sequence[Evaluation]) -> dict[str, object]:
    factor = 100 if front.info.percent else 1
    above: list[float] = []
    below: list[float] = []
    for row in (point_row(front, e) for e in points):
        value, interval = row["validation"], row["validation_interval"]
        above.append(factor * (interval[1] - value) if interval else 0.0)
        below.append(factor * (value - interval[0]) if interval else 0.0)
    return {"type": "data", "array": above, "arrayminus": below, "thickness": 1, "width": 0}


def _cell(width: float) -> str:
    if np.isnan(width):
        return "fp"
    return f"{width:.2g}"


def bits_only_figure(front: ParetoFront) -> go.Figure:
    """The heat map alone, small enough to be stored in a study."""
    figure = go.Figure(bits_trace(front.points, *width_table(front.points)))
    figure.update_yaxes(autorange="reversed", dtick=1, tickfont_size=10)
    figure.update_layout(
        template="none", font_family=_FONT,
        title={"text": "bit width per layer and point of the front", "x": 0.02},
        margin={"l": 130, "t": 60, "b": 110}, xaxis_tickangle=-60,
    )  # fmt: skip
    return figure


def trial_bits_figure(front: ParetoFront, evaluation: Evaluation) -> go.Figure:
    """Bit width of every layer of one point."""
    names, widths = width_table([evaluation])
    bars = [round(float(width), 3) for width in widths[:, 0]]
    figure = go.Figure(
        go.Bar(
            x=names, y=bars, text=[_cell(width) for width in bars], textposition="outside",
            marker_color=[BIT_COLORS[min(8, round(width))] for width in bars],
            marker_line={"color": "#8a8f94", "width": 0.5}, cliponaxis=False,
        )
    )  # fmt: skip
    texts = cell_texts(front, evaluation, every_cost=True)
    title = f"trial {evaluation.trial}: {texts['size']}, {texts[front.info.metric]}"
    figure.update_layout(
        template="none", title={"text": title, "x": 0.02}, font_family=_FONT,
        yaxis_range=[0, 8.9], yaxis_dtick=2, yaxis_title="weight bits",
        xaxis_tickangle=-60, margin={"b": 120, "t": 60},
    )  # fmt: skip
    return figure
