"""A front, and two fronts side by side, as rich tables and as plain dictionaries for --json."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from quant_ops.errors import UsageError
from search.budget import format_size
from search.dominance import HypervolumeScale
from search.evaluation import Evaluation, within
from search.front import BASELINES, ParetoFront, best_of
from search.point_row import cell_texts, format_metric, point_row

if TYPE_CHECKING:
    from search.strategies.table import Capability

_LEFT = {"strategy"}
_ROWS = 12
PIPE_WIDTH = 120


def front_to_dict(front: ParetoFront) -> dict[str, Any]:
    """What `search show --json` prints."""
    info = front.info
    return {
        "task": info.task,
        "metric": info.metric,
        "float": {"validation": info.float_validation, "size_bytes": info.float_size_bytes},
        "hypervolume": front.hypervolume,
        "n_evaluations": front.n_evaluations,
        "early_stop": {"stopped": front.n_stopped, "saved": front.saved},
        "seconds": front.seconds,
        "points": [point_row(front, e) for e in front.points],
        "baselines": [point_row(front, e) for e in front.baselines],
        "budgets": [_at_size(front, size) for size in info.budgets.sizes],
    }


def stdout_console() -> Console:
    """Where results go; a pipe is given the room that a table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, PIPE_WIDTH))


def print_front(front: ParetoFront, console: Console) -> None:
    """The front, the baselines, and the best of each at every size budget."""
    info = front.info
    float_metric = format_metric(info.float_validation, percent=info.percent)
    console.print(
        f"[bold]{info.task}[/bold]: float {format_size(info.float_size_bytes)}, {info.metric} "
        f"{float_metric} on {info.n_validation:,} validation samples"
    )
    console.print(front_table(front))
    if info.budgets.sizes:
        console.print(budget_table(front))
    stopped = ""
    if front.n_stopped:
        stopped = (
            f" ({front.n_stopped:,} stopped early, {100 * front.saved:.0f} % of the forward "
            f"passes saved)"
        )
    console.print(
        f"hypervolume {front.hypervolume:.4f}, {front.n_evaluations:,} evaluations{stopped} in "
        f"{front.seconds:.0f} s; intervals are 95 %",
        style="dim",
    )


def print_capabilities(rows: "Sequence[Capability]", console: Console) -> None:
    """The table of search methods."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for title in ("what it does", "widths per", "activations", "budget-aware"):
        table.add_column(title)
    for title in ("deterministic", "training", "cost per trial"):
        table.add_column(title)
    for row in rows:
        traits = row.traits
        flags = (traits.activations, traits.budget_aware, traits.deterministic)
        table.add_row(
            row.name,
            traits.summary,
            ", ".join(traits.granularity),
            *("yes" if flag else "no" for flag in flags),
            "needed" if traits.needs_training else "no",
            traits.cost_per_trial,
        )
    console.print(table)


def front_table(front: ParetoFront) -> Table:
    """Every point, then the baselines inside the budgets that are none; smallest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    rows = [cell_texts(front, e) for e in front.points]
    limits = front.info.budgets.limits
    shown = {e.trial for e in front.points}
    baselines = [
        cell_texts(front, e)
        for e in front.baselines
        if e.trial not in shown and within(limits, e.costs)
    ]
    titles = list(dict.fromkeys(title for row in (*rows, *baselines) for title in row))
    for title in titles:
        table.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    if not titles:
        table.add_column("nothing is inside every budget")
    _add_rows(table, rows, titles)
    if baselines:
        table.add_section()
        _add_rows(table, baselines, titles, style="dim")
    return table


def budget_table(front: ParetoFront) -> Table:
    """At every size budget the best of the front, of uniform and of rate-distortion."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="best at or under", title_justify="left"
    )
    for title in ("budget", "front", *BASELINES):
        table.add_column(title, justify="right" if title == "budget" else "left")
    for size in front.info.budgets.sizes:
        table.add_row(
            format_size(size),
            *(
                _summary(front, _best(front, points, size))
                for points in _contenders(front).values()
            ),
        )
    return table


def compare_to_dict(fronts: Sequence[ParetoFront], names: Sequence[str]) -> dict[str, Any]:
    """Two or more runs of one task at equal sizes, hypervolumes on common constants.

    Raises:
        UsageError: the runs are not of one task and metric.
    """
    _require_one_task(fronts, names)
    scale = common_scale([front.info.scale for front in fronts])
    sizes = aligned_sizes(fronts)
    return {
        "task": fronts[0].info.task,
        "metric": fronts[0].info.metric,
        "scale": {
            "size_bytes": [scale.smallest_bytes, scale.largest_bytes],
            "loss": [0.0, scale.worst_loss],
        },
        "runs": [
            {
                "name": name,
                "hypervolume": front.hypervolume_on(scale),
                "n_evaluations": front.n_evaluations,
                "seconds": front.seconds,
                "n_points": len(front.points),
            }
            for name, front in zip(names, fronts, strict=True)
        ],
        "sizes": [
            {
                "size_bytes": size,
                "best": [
                    None
                    if (best := _best(front, front.points, size)) is None
                    else point_row(front, best)
                    for front in fronts
                ],
            }
            for size in sizes
        ],
    }


def print_comparison(fronts: Sequence[ParetoFront], names: Sequence[str], console: Console) -> None:
    """`compare_to_dict` as two tables; the lowest loss of a row is bold."""
    value = compare_to_dict(fronts, names)
    sizes = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    sizes.add_column("at or under", justify="right")
    for name in names:
        sizes.add_column(name)
    for size in (row["size_bytes"] for row in value["sizes"]):
        best = [_best(front, front.points, size) for front in fronts]
        lowest = min((e.loss for e in best if e is not None), default=math.inf)
        cells = [
            Text(_summary(f, e), "bold" if e is not None and e.loss == lowest else "")
            for f, e in zip(fronts, best, strict=True)
        ]
        sizes.add_row(format_size(size), *cells)
    runs = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("run", "hypervolume", "points", "evaluations", "seconds"):
        runs.add_column(title, justify="left" if title == "run" else "right")
    for run in value["runs"]:
        runs.add_row(
            run["name"],
            f"{run['hypervolume']:.4f}",
            str(run["n_points"]),
            f"{run['n_evaluations']:,}",
            f"{run['seconds']:.0f}",
        )
    console.print(Group(Text(f"{value['task']}, {value['metric']}", "bold"), sizes, runs))


def common_scale(scales: Sequence[HypervolumeScale]) -> HypervolumeScale:
    """One scale that holds them all, so that hypervolumes compare."""
    return HypervolumeScale(
        min(scale.smallest_bytes for scale in scales),
        max(scale.largest_bytes for scale in scales),
        max(scale.worst_loss for scale in scales),
    )


def aligned_sizes(fronts: Sequence[ParetoFront]) -> list[int]:
    """Every size budget, and a dozen round sizes that span the fronts; ascending."""
    sizes = [e.size_bytes for front in fronts for e in front.points]
    wanted = {size for front in fronts for size in front.info.budgets.sizes}
    if not sizes:
        return sorted(wanted)
    low, high = math.log(min(sizes)), math.log(max(sizes))
    steps = [math.exp(low + (high - low) * i / (_ROWS - 1)) for i in range(_ROWS)]
    return sorted(wanted | {_round_up(step) for step in steps})


def _round_up(n_bytes: float) -> int:
    """To two significant digits, never down: every front still has its smallest point.

    >>> _round_up(104_321), _round_up(100_000), _round_up(7)
    (110000, 100000, 7)
    """
    unit: int = 10 ** max(0, math.floor(math.log10(n_bytes)) - 1)
    return math.ceil(round(n_bytes / unit, 6)) * unit


def _contenders(front: ParetoFront) -> dict[str, Sequence[Evaluation]]:
    own = {name: [e for e in front.baselines if e.strategy == name] for name in BASELINES}
    return {"front": front.points, **own}


def _best(front: ParetoFront, points: Sequence[Evaluation], size: int) -> Evaluation | None:
    return best_of(points, size, trained_apart=front.info.trained_apart)


def _at_size(front: ParetoFront, size: int) -> dict[str, Any]:
    best = {name: _best(front, points, size) for name, points in _contenders(front).items()}
    return {
        "size_bytes": size,
        **{name: None if e is None else point_row(front, e) for name, e in best.items()},
    }


def _summary(front: ParetoFront, evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "-"
    metric = format_metric(evaluation.metric, percent=front.info.percent)
    return f"{format_size(evaluation.size_bytes)}  loss {evaluation.loss:.3g}  {metric}"


def _add_rows(
    table: Table, rows: Sequence[dict[str, str]], titles: Sequence[str], style: str = ""
) -> None:
    for row in rows:
        table.add_row(*(row.get(title, "-") for title in titles), style=style)


def _require_one_task(fronts: Sequence[ParetoFront], names: Sequence[str]) -> None:
    first = fronts[0].info
    for name, front in zip(names, fronts, strict=True):
        if (front.info.task, front.info.metric) != (first.task, first.metric):
            raise UsageError(
                f"runs to compare must be of one task and metric, but {names[0]} is "
                f"{first.task} ({first.metric}) and {name} is {front.info.task} "
                f"({front.info.metric})"
            )
