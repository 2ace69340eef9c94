"""One point of a front as plain values and as printed text: shared by tables, plots and notes."""

from typing import Any

from search.budget import format_cost, format_size
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.intervals import loss_interval, metric_interval


def point_row(front: ParetoFront, evaluation: Evaluation) -> dict[str, Any]:
    """JSON values of one point, 95 % intervals included; sizes in bytes, drops as `front.drop`."""
    info = front.info
    metric = metric_interval(
        evaluation.metric,
        percent=info.percent,
        n_samples=info.n_validation,
        stderr=evaluation.notes.get("metric_stderr"),
    )
    return {
        "trial": evaluation.trial,
        "strategy": evaluation.strategy,
        "recipe": evaluation.recipe,
        "size_bytes": evaluation.size_bytes,
        "ratio": info.float_size_bytes / max(evaluation.size_bytes, 1),
        "loss": evaluation.loss,
        "loss_interval": list(loss_interval(evaluation)),
        "validation": evaluation.metric,
        "validation_interval": None if metric is None else list(metric),
        "drop": front.drop(evaluation),
        "agreement": evaluation.agreement,
        "mean_weight_bits": front.mean_weight_bits.get(evaluation.trial),
        "test": front.test.get(evaluation.trial),
        "costs": {k: v for k, v in evaluation.costs.items() if k != "size_bytes"},
        "packed": front.packed.get(evaluation.trial),
    }


def format_metric(value: float | None, *, percent: bool) -> str:
    """A metric as printed.

    >>> format_metric(0.9173, percent=True), format_metric(12.345678, percent=False)
    ('91.73 %', '12.346')
    """
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if percent else f"{value:.5g}"


def format_metric_interval(row: dict[str, Any], *, percent: bool) -> str:
    """The validation metric of a `point_row` with its interval."""
    text = format_metric(row["validation"], percent=percent)
    if row["validation_interval"] is None:
        return text
    low, high = row["validation_interval"]
    if percent:
        return f"{text} ({100 * low:.1f}-{100 * high:.1f})"
    return f"{text} ({low:.4g}-{high:.4g})"


def format_loss(row: dict[str, Any]) -> str:
    """The quality loss of a `point_row` with the half width of its interval."""
    half = row["loss_interval"][1] - row["loss"]
    return f"{row['loss']:.3g} ± {half:.1g}" if half > 0 else f"{row['loss']:.3g}"


def origin(row: dict[str, Any]) -> str:
    """Strategy of a `point_row`, with the recipe of a recovered one."""
    return f"{row['strategy']} + {row['recipe']}" if row["recipe"] else str(row["strategy"])


def cell_texts(
    front: ParetoFront, evaluation: Evaluation, *, every_cost: bool = False
) -> dict[str, str]:
    """Label to printed text, in the order of the columns of the table.

    Costs are those that have a budget, or all.
    """
    row = point_row(front, evaluation)
    percent = front.info.percent
    bits = row["mean_weight_bits"]
    texts = {
        "trial": str(row["trial"]) if row["trial"] >= 0 else "-",
        "strategy": origin(row),
        "size": format_size(row["size_bytes"]),
        "smaller": f"{row['ratio']:.1f}x",
        "bits": "-" if bits is None else f"{bits:.2f}",
        "loss": format_loss(row),
        front.info.metric: format_metric_interval(row, percent=percent),
        "agree": "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %",
    }
    if front.test:
        texts["test"] = format_metric(row["test"], percent=percent)
    limits = front.info.budgets.limits
    costs = {k: v for k, v in row["costs"].items() if every_cost or k in limits}
    return texts | {short(name): format_cost(name, value) for name, value in costs.items()}


def short(cost: str) -> str:
    """A cost's name as a column title.

    >>> short("ram_bytes"), short("latency_ms"), short("bops")
    ('ram', 'latency', 'bops')
    """
    return cost.removesuffix("_bytes").removesuffix("_ms").removesuffix("_nj")
