"""What a target will refuse, said before a search for it begins."""

from quant_ops.errors import UsageError
from quant_ops.lowering import lower
from quant_ops.packed import PackedModel
from search.exporters.base import Refusal
from search.exporters.table import EXPORTERS, find_exporter
from search.prepare import Prepared
from search.targets import find_target


def foreseen_refusals(prepared: Prepared) -> tuple[Refusal, ...]:
    """Operators and layers that the target of a run cannot express at any width."""
    target = find_target(prepared.config.target)
    if not (target.integer_only or target.exporter):
        return ()
    model = prepared.evaluator.bank.quantize(prepared.space.largest())
    refusals = []
    if target.integer_only:
        for island in lower(model).float_islands:
            refusals.append(
                Refusal(
                    f"{island.name} ({island.op})",
                    f"it would run in float: {island.reason}",
                    "replace it by an operator with an integer form, or take --target onnx",
                )
            )
    if not refusals and target.exporter in EXPORTERS:
        # never packed: the layers keep the names that the user knows
        refusals += find_exporter(target.exporter).refusals(PackedModel(b"", model))
    return tuple(refusals)


def require_target_runs(prepared: Prepared) -> None:
    """Refuse a run whose target cannot run what it would find.

    Raises:
        UsageError: with every refusal.
    """
    refusals = foreseen_refusals(prepared)
    if refusals:
        said = "\n  ".join(str(refusal) for refusal in refusals)
        raise UsageError(
            f"target {prepared.config.target!r} cannot run task {prepared.task.name!r}:\n  {said}"
        )
