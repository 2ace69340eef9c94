"""The one thing a user writes: a model, its data, and how to judge its outputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

Batch: TypeAlias = tuple[tuple[Tensor, ...], Any]  # inputs, target
Batches: TypeAlias = Iterable[Batch]


@dataclass(frozen=True)
class Metric:
    """How good a model's outputs are against the labels.

    Attributes:
        name: as printed.
        function: (outputs, target) -> one value per sample, shape (batch,), if `per_sample`;
            otherwise one float for the outputs and targets of the whole split.
        higher_is_better: turned round once on entry, once on printing.
        per_sample: the split's value is the mean over samples.
        percent: printed times 100 with a percent sign.
    """

    name: str
    function: Callable[[Any, Any], Any]
    higher_is_better: bool = True
    per_sample: bool = True
    percent: bool = False

    def format(self, value: float | None) -> str:
        """The value as printed.

        >>> ACCURACY.format(0.9173)
        '91.73 %'
        """
        if value is None:
            return "-"
        return f"{100 * value:.2f} %" if self.percent else f"{value:.5g}"


def _correct(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs.argmax(dim=1) == target).double()


ACCURACY = Metric("top-1", _correct, percent=True)


@dataclass(frozen=True)
class Preprocessing:
    """What turns a stored image into the model's input: (pixel / 255 - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: str = "NCHW"


@dataclass(frozen=True)
class Task:
    """A float model and what it takes to compress it. See README for a twenty-line example.

    A batch is (inputs, target): a tuple of tensors with the batch in dimension 0, and whatever
    the metric understands. Any iterable of batches will do, a DataLoader among them.

    Attributes:
        name: short, used in folder names.
        model: float, in evaluation mode.
        calibration: batches that set ranges and corrections; targets may be None.
        validation: batches that drive the search.
        test: labelled batches read by `search report --test` alone (a function, so that they
            are not even loaded before).
        training: gives batches for fine-tuning, new at each call.
        metric: judged on validation and test.
        quality_loss: "kl" (outputs are logits), "relative-error", "auto" (kl where the metric
            is accuracy), or a function (outputs, float outputs) -> (batch,).
        training_loss: (outputs, target) -> scalar.
        class_names, preprocessing: travel with an export.
        validation_seen_in_training: the checkpoint knows the validation inputs.
        worst_loss: quality loss of a useless model: the reference point of the hypervolume.
    """

    name: str
    model: nn.Module
    calibration: Batches
    validation: Batches
    test: Callable[[], Batches] | None = None
    training: Callable[[], Batches] | None = None
    metric: Metric = ACCURACY
    quality_loss: str | Callable[[Any, Any], Tensor] = "auto"
    training_loss: Callable[[Any, Any], Tensor] = functional.cross_entropy
    class_names: Sequence[str] = field(default=())
    preprocessing: Preprocessing | None = None
    validation_seen_in_training: bool = False
    worst_loss: float | None = None
    example_inputs: tuple[Tensor, ...] | None = None

    def examples(self) -> tuple[Tensor, ...]:
        """One batch of inputs for tracing: `example_inputs`, else the first calibration batch."""
        if self.example_inputs is not None:
            return self.example_inputs
        inputs, _ = next(iter(self.calibration))
        return inputs
