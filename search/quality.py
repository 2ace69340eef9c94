"""How far a quantized model's outputs are from the float model's, one number per sample."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant_ops.errors import UsageError
from search.task import ACCURACY, Metric, Task

QualityLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""(outputs, float outputs) -> (batch,) in float64; inf for a sample with outputs not finite."""


def quality_function(task: Task, float_outputs: Sequence[Any] = ()) -> QualityLoss:
    """What the search minimises, as the task's `quality_loss` says.

    Args:
        task: "auto" means "kl" where the metric is accuracy or classes are named, else
            "relative-error".
        float_outputs: the float model's outputs on the whole split, batch by batch; the power
            that a relative error is relative to. Without them it is each sample's own.

    Raises:
        UsageError: `quality_loss` is no known name.
    """
    chosen = _chosen(task)
    if callable(chosen):
        return _guarded(chosen)
    if chosen == "kl":
        return _guarded(kl_divergence)
    power = _mean_power(float_outputs) if float_outputs else None
    return _guarded(lambda outputs, floats: relative_error(outputs, floats, power))


def worst_loss(task: Task, float_outputs: Sequence[Any]) -> float:
    """Quality loss of a useless model: the task's own, else one that knows nothing of the input.

    That is log(classes) for "kl" (all classes equally likely, against a confident float model)
    and 1 for "relative-error" (outputs of 0).

    Raises:
        UsageError: the quality loss is a function and the task states no `worst_loss`.
    """
    if task.worst_loss is not None:
        return task.worst_loss
    chosen = _chosen(task)
    if callable(chosen):
        raise UsageError(
            f"task {task.name!r} brings a quality loss of its own, so it must say what a useless "
            f"model gets; give Task(worst_loss=...)"
        )
    if chosen == "kl":
        return sum(math.log(max(leaf.shape[1], 2)) for leaf in _float_leaves(float_outputs[0]))
    return 1.0


def is_kl(task: Task) -> bool:
    """Whether the task is judged by divergence of its logits."""
    return _chosen(task) == "kl"


def _chosen(task: Task) -> str | QualityLoss:
    if task.quality_loss != "auto":
        if not callable(task.quality_loss) and task.quality_loss not in ("kl", "relative-error"):
            raise UsageError(
                f"quality_loss must be 'kl', 'relative-error', 'auto' or a function, but task "
                f"{task.name!r} gives {task.quality_loss!r}"
            )
        return task.quality_loss
    return "kl" if task.metric is ACCURACY or task.class_names else "relative-error"


def kl_divergence(outputs: Any, float_outputs: Any) -> Tensor:
    """sum_c p_c log(p_c / q_c): p from the float logits, q from the quantized ones, in nats.

    Every leaf is (batch, classes, *positions); positions are averaged, leaves are summed.
    Returns (batch,) in float64.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -1000.0]])).exp()
    tensor([2.], dtype=torch.float64)
    """
    losses = []
    for logits, float_logits in _paired(outputs, float_outputs):
        if float_logits.ndim < 2:
            raise UsageError(
                f"the quality loss 'kl' needs logits of shape (batch, classes, ...), but an output "
                f"has shape {tuple(float_logits.shape)}; give Task(quality_loss='relative-error')"
            )
        log_q = logits.double().log_softmax(dim=1)
        log_p = float_logits.double().log_softmax(dim=1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        losses.append(divergence.flatten(1).mean(dim=1) if divergence.ndim > 1 else divergence)
    return torch.stack(losses).sum(dim=0).clamp_min(0)  # rounding can give -1e-17


def relative_error(
    outputs: Any, float_outputs: Any, power: Sequence[float] | None = None
) -> Tensor:
    """mean over leaves of |y - f|^2 / power, with f the float outputs: (batch,) in float64.

    Args:
        outputs: y, any pytree; leaves that are not floating point are passed over.
        float_outputs: f, of the same structure.
        power: per leaf the mean of |f|^2 over the samples of a split, so that a sample whose
            output is near 0 does not outweigh all others; None for each sample's own |f|^2.

    >>> relative_error(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([0.6400], dtype=torch.float64)
    """
    losses = []
    for index, (y, f) in enumerate(_paired(outputs, float_outputs)):
        f64 = f.double()
        error = _power(y.double() - f64)
        of_leaf = _power(f64) if power is None else torch.tensor(power[index]).double()
        # A float output of exactly 0 makes any deviation infinitely wrong, none not wrong at all.
        losses.append(torch.where(error == 0, 0.0, error / of_leaf))
    return torch.stack(losses).mean(dim=0)


def metric_loss(metric: Metric) -> QualityLoss:
    """(outputs, target) -> (batch,): a per-sample metric, minimised; 1 - correct for accuracy.

    A metric that is higher the better becomes 1 - value where it is a share (`percent`), and
    -value elsewhere.

    Raises:
        UsageError: the metric is not per sample.
    """
    if not metric.per_sample:
        raise UsageError(
            f"--objective metric needs a metric with one value per sample, but {metric.name!r} is "
            f"of the whole split; search by quality loss instead"
        )

    def loss(outputs: Any, target: Any) -> Tensor:
        value = metric.function(outputs, target).double()
        return _minimised(metric, value)  # type: ignore[no-any-return]

    return _guarded(loss)


def metric_value_as_loss(metric: Metric, value: float) -> float:
    """The value of a split as a loss; the same turn as `metric_loss`.

    >>> metric_value_as_loss(ACCURACY, 0.75)
    0.25
    """
    return float(_minimised(metric, value))


def _minimised(metric: Metric, value: Any) -> Any:
    if not metric.higher_is_better:
        return value
    return (1 if metric.percent else 0) - value


def evaluate_metric(metric: Metric, outputs: Sequence[Any], targets: Sequence[Any]) -> float:
    """The metric of a split, in its own direction.

    Args:
        metric: per sample (averaged here) or of the whole split (called once on all of it).
        outputs: one pytree per batch.
        targets: one per batch.

    Raises:
        UsageError: a per-sample metric whose answer is not (batch,).
    """
    if not metric.per_sample:
        return float(metric.function(_joined(outputs), _joined(targets)))
    values = []
    for batch, target in zip(outputs, targets, strict=True):
        value = metric.function(batch, target)
        n_samples = _n_samples(batch)
        if not isinstance(value, Tensor) or value.shape != (n_samples,):
            raise UsageError(
                f"the metric {metric.name!r} must give one value per sample, a tensor of shape "
                f"({n_samples},), but gave {_describe(value)}; or say Metric(per_sample=False)"
            )
        values.append(value.double())
    return float(torch.cat(values).mean())


def agreement(outputs: Any, float_outputs: Any) -> Tensor:
    """Share of positions whose top-1 class is the float model's: (batch,) in float64.

    The first leaf counts, (batch, classes, *positions). Ties go to the lowest index; outputs
    that are not finite agree with nothing.

    >>> agreement(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    logits, float_logits = _paired(outputs, float_outputs)[0]
    same = (_top(logits) == _top(float_logits)) & logits.isfinite().all(dim=1)
    return same.double().flatten(1).mean(dim=1) if same.ndim > 1 else same.double()


def _top(logits: Tensor) -> Tensor:
    """The first class that has the largest logit; argmax promises no order among equals."""
    n_classes = logits.shape[1]
    index = torch.arange(n_classes, device=logits.device)
    index = index.reshape(-1, *(1 for _ in logits.shape[2:]))
    is_top = logits == logits.amax(dim=1, keepdim=True)
    return torch.where(is_top, index, n_classes).amin(dim=1)


def _guarded(function: QualityLoss) -> QualityLoss:
    """Float64, shape (batch,), and inf wherever the outputs or the loss are not finite."""

    def loss(outputs: Any, reference: Any) -> Tensor:
        values = function(outputs, reference)
        n_samples = _n_samples(outputs)
        if not isinstance(values, Tensor) or values.shape != (n_samples,):
            raise UsageError(
                f"a quality loss must give one value per sample, a tensor of shape ({n_samples},), "
                f"but gave {_describe(values)}"
            )
        sound = torch.isfinite(values)
        for leaf in _float_leaves(outputs):
            sound = sound & leaf.isfinite().reshape(n_samples, -1).all(dim=1)
        return torch.where(sound, values.double(), math.inf)

    return loss


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)}"
    return type(value).__name__


def _float_leaves(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _n_samples(tree: Any) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _paired(outputs: Any, float_outputs: Any) -> list[tuple[Tensor, Tensor]]:
    pairs = list(zip(_float_leaves(outputs), _float_leaves(float_outputs), strict=True))
    if not pairs:
        raise UsageError(
            "the model gives no floating-point output, so nothing measures how far a quantized "
            "one is from it; give Task(quality_loss=...) a function"
        )
    assert all(y.shape == f.shape for y, f in pairs)
    return pairs


def _power(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).square().sum(dim=1)


def _mean_power(float_outputs: Sequence[Any]) -> list[float]:
    columns = zip(*(_float_leaves(batch) for batch in float_outputs), strict=True)
    return [float(torch.cat([_power(x.double()) for x in leaf]).mean()) for leaf in columns]


def _joined(batches: Sequence[Any]) -> Any:
    """One pytree with the tensors of all batches joined along dimension 0."""
    return pytree.tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else list(leaves),
        *batches,
    )
