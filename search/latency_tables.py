"""Latency tables and checks of them as printed tables and JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cost_models.latency.table import LatencyTable
from quant_ops.bit_widths import FLOAT_BITS
from search.profiling import LatencyCheck, LatencySummary


def table_row(path: Path, table: LatencyTable) -> dict[str, Any]:
    """What a list says of one table."""
    layers = [e.work for e in table.entries if e.work.operator in ("conv", "linear")]
    return {
        "name": path.stem,
        "device": table.device["name"],
        "backend": table.backend,
        "source": table.source,
        "date": table.date,
        "unit": table.unit,
        "batch": table.batch,
        "shapes": len(set(layers)),
        "entries": len(table.entries),
        "kernels": {
            operator: [
                f"{rule.kernel} (W{_width(rule.weight_bits)} A{_width(rule.activation_bits)})"
                for rule in table.rules
                if operator in rule.operators
            ]
            for operator in ("conv", "linear")
        },
        "complete": table.complete,
        "path": str(path),
    }


def print_listed(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Every table with its device, source, date, shapes and widths."""
    for row in rows:
        if "error" in row:
            console.print(f"[bold]{row['name']}[/bold]: cannot be read: {row['error']}")
            continue
        unfinished = "" if row["complete"] else " [red]not complete[/red]"
        console.print(f"[bold]{row['name']}[/bold]: {row['device']}{unfinished}", highlight=False)
        unit = "microseconds" if row["unit"] == "us" else "no unit: use ratios only"
        for text in (
            f"{row['source']}",
            f"{row['date']}, {row['backend']}, {unit}, batch {row['batch']}",
            f"{row['shapes']} layer shapes, {row['entries']} entries",
            *(f"{op}: {', '.join(kernels)}" for op, kernels in row["kernels"].items() if kernels),
        ):
            console.print(f"  {text}", highlight=False, soft_wrap=True)


def print_profile(table: LatencyTable, path: Path, console: Console) -> None:
    """What was measured and how well sizes between are interpolated."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("operator", "kernel", "entries", "time", "median spread", "error", "90 %"):
        shown.add_column(title, justify="left" if title in ("operator", "kernel") else "right")
    for (operator, attributes, kernel), fit in sorted(table.fits.items()):
        entries = [
            e
            for e in table.entries
            if (e.work.operator, e.work.attributes, e.kernel) == (operator, attributes, kernel)
        ]
        spreads = sorted(e.spread for e in entries)
        shown.add_row(
            _special(entries[0].work.describe(), operator),
            kernel,
            str(len(entries)),
            f"{min(fit.times):.2f} to {max(fit.times):.1f} us",
            f"{100 * spreads[len(spreads) // 2]:.0f} %",
            _share(fit.error[0]),
            _share(fit.error[1]),
        )
    console.print(shown)
    console.print(
        f"{table.device['name']}; a run costs {table.call_overhead:.1f} us beside its kernels; "
        f"error: of a size left out, by the roofline of the others",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"kept in {path}", highlight=False, soft_wrap=True)


def checks_to_dict(checks: Mapping[int, LatencyCheck]) -> dict[str, Any]:
    """What `--json` prints."""
    if not checks:
        return {"networks": [], "summary": None}
    summary = LatencySummary.of(list(checks.values()))
    return {
        "networks": [
            {
                "trial": trial,
                "predicted_ms": c.predicted_ms,
                "measured_ms": c.measured_ms,
                "ratio": c.ratio,
                "spread": c.spread,
                "table": c.table,
                "device": c.device,
            }
            for trial, c in checks.items()
        ],
        "summary": {
            "n_networks": summary.n_networks,
            "median_ratio": summary.median_ratio,
            "median_error": summary.median_error,
            "rank_correlation": summary.rank_correlation,
            "repeatability": summary.repeatability,
        },
    }


def print_checks(checks: Mapping[int, LatencyCheck], console: Console) -> None:
    """Predicted and measured latency side by side; nothing where nothing was measured."""
    if not checks:
        return
    shown = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="whole networks, timed", title_justify="left"
    )
    for title in ("trial", "predicted", "measured", "ratio", "spread"):
        shown.add_column(title, justify="right")
    for trial, check in sorted(checks.items(), key=lambda item: item[1].measured_ms):
        shown.add_row(
            str(trial),
            f"{check.predicted_ms:.4g} ms",
            f"{check.measured_ms:.4g} ms",
            f"{check.ratio:.2f}",
            f"{100 * check.spread:.0f} %",
        )
    console.print(shown)
    first = next(iter(checks.values()))
    console.print(f"table {first.table!r}, timed on {first.device}", highlight=False, style="dim")
    console.print(LatencySummary.of(list(checks.values())).line(), style="dim", soft_wrap=True)


def _special(text: str, operator: str) -> str:
    """A family of calls, without its sizes."""
    if operator != "conv":
        return operator
    kernel, _, rest = text.partition(" convolution")
    special = rest.partition(" at ")[2].partition(" ")[2]
    return f"{kernel} conv {special}".strip()


def _width(bit_width: int) -> str:
    return "32" if bit_width >= FLOAT_BITS else str(bit_width)


def _share(value: float) -> str:
    return "-" if value != value else f"{100 * value:.0f} %"
