"""front.png and bits.png."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from search.atomic import write_bytes
from search.budget import format_size
from search.evaluation import Evaluation
from search.front import TRAINED_FRONT, ParetoFront
from search.intervals import Z95
from search.point_row import format_metric, point_row

# Okabe and Ito's colours: told apart by everybody.
FRONT_COLOR, FLOAT_COLOR, BUDGET_COLOR = "#0072B2", "#222222", "#CC3311"
BASELINE_STYLES = {"uniform": ("#E69F00", "s"), "rate-distortion": ("#009E73", "^")}
BIT_COLORS = (
    "#f4f1ea", "#fde0a0", "#fdbf6f", "#f8935a", "#ea6a5c", "#cf4670", "#a5327e", "#74278a",
    "#3d1d79",
)  # fmt: skip
MAX_COLUMNS = 24
_GRAY = "#666666"


def save_plots(
    front: ParetoFront, folder: Path, *, evaluations: Sequence[Evaluation] = ()
) -> list[Path]:
    """Write front.png and, where there is a point, bits.png; gives their paths.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    figures = {"front.png": front_figure(front, evaluations=evaluations)}
    if front.points:
        figures["bits.png"] = bits_figure(front)
    for name, figure in figures.items():
        _save(figure, folder / name)
    return [folder / name for name in figures]


def front_figure(front: ParetoFront, *, evaluations: Sequence[Evaluation] = ()) -> Figure:
    """Quality loss and metric over size, with baselines, budgets and the float model."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    figure.set_facecolor("white")
    loss_axes, metric_axes = figure.subplots(1, 2)
    _draw_losses(loss_axes, front, evaluations)
    _draw_metrics(metric_axes, front)
    sizes = [e.size_bytes for e in (*front.points, *front.baselines)]
    sizes += front.info.budgets.sizes
    _style_size_axis(loss_axes, sizes or [front.info.float_size_bytes])
    _style_size_axis(metric_axes, [*sizes, front.info.float_size_bytes])
    for axes in (loss_axes, metric_axes):
        _draw_budgets(axes, front)
    handles, labels = loss_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(_title(front), x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def bits_figure(front: ParetoFront) -> Figure:
    """Bit width of every layer (rows) in every point (columns, smallest first)."""
    points = thinned(front.points, MAX_COLUMNS)
    names, widths = width_table(points)
    n_rows, n_columns = widths.shape
    cell = 0.24
    label_width = 0.085 * max(map(len, names)) + 0.4
    size = (label_width + max(0.5 * n_columns, 4.5) + 1.4, cell * n_rows + 2.3)
    figure = Figure(figsize=size, layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots()
    colors, norm = bit_colors()
    image = axes.imshow(widths, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    _write_widths(axes, widths)
    axes.set_yticks(range(n_rows), names, fontsize=8)
    axes.set_xticks(
        range(n_columns), [_column_title(front, e) for e in points],
        rotation=90 if n_columns > 6 else 0, fontsize=8,
    )  # fmt: skip
    axes.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=range(9), fraction=0.04, pad=0.02, aspect=30)
    bar.ax.set_yticklabels(["pruned", *(str(b) for b in range(1, 9))], fontsize=8)
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)
    bar.set_label("weight bits", fontsize=9)
    shown = "" if len(points) == len(front.points) else f" ({len(points)} of {len(front.points)})"
    axes.set_title(
        f"{front.info.task}: bit width per layer and point of the front{shown}",
        loc="left", fontsize=11, fontweight="bold", pad=10,
    )  # fmt: skip
    return figure


def width_table(points: Sequence[Evaluation]) -> tuple[list[str], NDArray[np.float64]]:
    """Layer names, and mean bit widths of shape (layers, points); NaN where a layer is float."""
    names = list(dict.fromkeys(name for e in points for name, _ in e.candidate.layers))
    table = np.full((len(names), len(points)), np.nan)
    row_of = {name: row for row, name in enumerate(names)}
    for column, e in enumerate(points):
        for name, quant in e.candidate.layers:
            table[row_of[name], column] = sum(quant.bit_widths) / len(quant.bit_widths)
    return names, table


def thinned(points: Sequence[Evaluation], n: int) -> list[Evaluation]:
    """At most `n` points, evenly by rank, both ends kept."""
    if len(points) <= n:
        return list(points)
    return [points[round(i * (len(points) - 1) / max(n - 1, 1))] for i in range(n)]


def bit_colors() -> tuple[Colormap, BoundaryNorm]:
    """Colours of 0 to 8 bits, one per whole width; float layers are grey."""
    colors = LinearSegmentedColormap.from_list("bits", BIT_COLORS, N=len(BIT_COLORS))
    return colors.with_extremes(bad="#d0d4d8"), BoundaryNorm(np.arange(-0.5, 9), len(BIT_COLORS))


def _draw_losses(axes: Axes, front: ParetoFront, evaluations: Sequence[Evaluation]) -> None:
    cloud = [e for e in evaluations if not e.pruned and np.isfinite(e.loss)]
    if cloud:
        axes.scatter(
            [e.size_bytes for e in cloud], [e.loss for e in cloud],
            s=7, color="#b8bec4", linewidths=0, label=f"{len(cloud):,} evaluations", zorder=1,
        )  # fmt: skip
    for name, points in _baselines(front):
        color, marker = BASELINE_STYLES[name]
        axes.plot(
            [e.size_bytes for e in points], [e.loss for e in points],
            color=color, marker=marker, ms=5, lw=1, ls=":", label=name, zorder=2,
        )  # fmt: skip
    for name, part in front.parts().items():
        x, y = [e.size_bytes for e in part], [e.loss for e in part]
        error = [Z95 * e.loss_stderr for e in part]
        axes.step(x, y, where="post", color=FRONT_COLOR, lw=1.4, alpha=0.7, zorder=3)
        axes.errorbar(
            x, y, yerr=error, fmt="D" if name == TRAINED_FRONT else "o", ms=5, color=FRONT_COLOR,
            elinewidth=1, label=name, zorder=4,
        )  # fmt: skip
    positive = [e.loss for e in (*front.points, *front.baselines) if e.loss > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 2, max(positive) * 2)
    axes.set_ylabel("quality loss (validation)")
    axes.set_title("quality loss over file size", loc="left", fontsize=10, color=_GRAY)


def _draw_metrics(axes: Axes, front: ParetoFront) -> None:
    info = front.info
    factor = 100 if info.percent else 1
    for name, points in _baselines(front):
        color, marker = BASELINE_STYLES[name]
        known = [(e.size_bytes, factor * e.metric) for e in points if e.metric is not None]
        axes.plot(*zip(*known, strict=True), color=color, marker=marker, ms=5, lw=1, ls=":")
    rows = [point_row(front, e) for e in front.points if e.metric is not None]
    for row in rows:
        if row["validation_interval"] is not None:
            low, high = row["validation_interval"]
            axes.vlines(row["size_bytes"], factor * low, factor * high, FRONT_COLOR, lw=1)
    for name, part in front.parts().items():
        known = [(e.size_bytes, factor * e.metric) for e in part if e.metric is not None]
        axes.plot(
            [x for x, _ in known], [y for _, y in known], color=FRONT_COLOR,
            marker="D" if name == TRAINED_FRONT else "o", ms=5, lw=1.2, zorder=4,
        )  # fmt: skip
    tested = [row for row in rows if row["test"] is not None]
    if tested:
        axes.plot(
            [row["size_bytes"] for row in tested], [factor * row["test"] for row in tested],
            ls="", marker="D", ms=5, mfc="white", color=FRONT_COLOR, label="test", zorder=5,
        )  # fmt: skip
        axes.legend(frameon=False, loc="lower right")
    if info.float_validation is not None:
        value = factor * info.float_validation
        axes.axhline(value, color=FLOAT_COLOR, lw=0.8, ls="--", zorder=1)
        axes.plot(info.float_size_bytes, value, marker="*", ms=13, color=FLOAT_COLOR, zorder=5)
        axes.annotate(
            f"float {format_metric(info.float_validation, percent=info.percent)}",
            (info.float_size_bytes, value), xytext=(-8, -14), textcoords="offset points",
            ha="right", fontsize=9, color=FLOAT_COLOR,
        )  # fmt: skip
    axes.set_ylabel(f"{info.metric} (validation{', %' if info.percent else ''})")
    axes.set_title(f"{info.metric} over file size", loc="left", fontsize=10, color=_GRAY)


def _baselines(front: ParetoFront) -> list[tuple[str, list[Evaluation]]]:
    found = [(name, [e for e in front.baselines if e.strategy == name]) for name in BASELINE_STYLES]
    return [(name, points) for name, points in found if points]


def _draw_budgets(axes: Axes, front: ParetoFront) -> None:
    for size in front.info.budgets.sizes:
        axes.axvline(size, color=BUDGET_COLOR, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            format_size(size), (size, 0), xycoords=("data", "axes fraction"), xytext=(-3, 5),
            textcoords="offset points", ha="right", va="bottom", rotation=90, fontsize=8,
            color=BUDGET_COLOR,
        )  # fmt: skip


def _style_size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    low, high = min(sizes) / 1.12, max(sizes) * 1.12
    axes.set_xlim(low, high)
    subs = (1, 2, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1, 3)
    axes.xaxis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("file size, header included")
    axes.grid(color="#e6e8ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _tick(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:g} {unit}"
    return f"{n_bytes:g} B"


def _title(front: ParetoFront) -> str:
    if not front.points:
        return f"{front.info.task}: nothing inside every budget"
    float_size = format_size(front.info.float_size_bytes)
    n = len(front.points)
    return f"{front.info.task}: {n} points, {front.reach()}, from {float_size} in float32"


def _column_title(front: ParetoFront, evaluation: Evaluation) -> str:
    metric = format_metric(evaluation.metric, percent=front.info.percent)
    return f"{format_size(evaluation.size_bytes)}\n{metric}"


def _write_widths(axes: Axes, widths: NDArray[np.float64]) -> None:
    for (row, column), width in np.ndenumerate(widths):
        if np.isnan(width):
            text, color = "fp", "#50565c"
        else:
            whole = float(width).is_integer()
            text = f"{width:.0f}" if whole else f"{width:.1f}"
            color = "white" if width >= 4 else "#332b22" if width else "#a09a90"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
