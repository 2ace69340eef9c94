"""A network that a peer quantized: its bytes, whether it is quantized at all, its quality."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from search.data import Split, load_split
from search.judge import Judge, Measurement
from search.quality import quality_function
from search.task import Batches, Task
from search.tasks.table import load_task

CHANNEL_BYTES = 6  # a float32 scale and a 16-bit bias


@dataclass(frozen=True)
class PeerWeight:
    """One layer as a peer quantized it.

    Attributes:
        values: (out_channels, ...), dequantized.
        bit_width: as the peer states it.
    """

    values: Tensor
    bit_width: int

    @property
    def size_bytes(self) -> float:
        """Codes without padding, a scale and a bias per channel; zero points are not counted."""
        return self.values.numel() * self.bit_width / 8 + CHANNEL_BYTES * len(self.values)

    @property
    def most_levels(self) -> int:
        """Distinct values in the channel that has most of them."""
        return max(int(row.unique().numel()) for row in self.values.flatten(1))


@dataclass(frozen=True)
class PeerNetwork:
    """A network in evaluation mode, and the layers that its size is made of."""

    model: nn.Module
    weights: Mapping[str, PeerWeight]

    @property
    def size_bytes(self) -> int:
        """Without any header or manifest: what no real file reaches."""
        return -int(-sum(weight.size_bytes for weight in self.weights.values()) // 1)

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise unless every layer of `layers` is there and has no more levels than it pays for.

        Raises:
            ValueError: names the layer, the levels it pays for and those it has.
        """
        missing = sorted(set(layers) - set(self.weights))
        if missing:
            raise ValueError(f"the peer left layers out: {missing}")
        for name, weight in self.weights.items():
            if weight.values.numel() != layers[name].weight.numel():
                raise ValueError(f"layer {name!r} has another shape than the float one")
            if weight.most_levels > 2**weight.bit_width:
                raise ValueError(
                    f"layer {name!r} is said to have {weight.bit_width} bits, but a channel of it "
                    f"has {weight.most_levels} distinct values; it is not quantized as stated"
                )


@dataclass(frozen=True)
class Bench:
    """The float network, the calibration images and the judge, the same for every peer."""

    task: Task
    layers: Mapping[str, nn.Module]
    calibration: Tensor
    validation: Judge

    @classmethod
    def load(cls, name: str, data: Path) -> "Bench":
        """Calibration images without their labels; validation judged as `search` judges it."""
        task = load_task(name, data=data)
        images = torch.cat([inputs[0] for inputs, _ in task.calibration])
        return cls(task, layers_of(task.model), images, judge_of(task, task.validation))

    @property
    def n_weights(self) -> int:
        return sum(layer.weight.numel() for layer in self.layers.values())

    def weight_bytes(self, size: int) -> int:
        """What `size` leaves for codes."""
        return size - CHANNEL_BYTES * sum(len(layer.weight) for layer in self.layers.values())

    def batches(self, batch_size: int) -> list[Tensor]:
        """The calibration images in order."""
        return list(self.calibration.split(batch_size))

    def measure_test(self, network: PeerNetwork) -> float | None:
        """The metric on the labelled test split: one read."""
        return measure(self._test, network).metric

    @cached_property
    def _test(self) -> Judge:
        assert self.task.test is not None
        return judge_of(self.task, self.task.test())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer by name."""
    wanted = (nn.Conv2d, nn.Linear)
    return {name: m for name, m in model.named_modules() if isinstance(m, wanted)}


def judge_of(task: Task, batches: Batches) -> Judge:
    """Judges networks on one split by divergence from the float model and by the metric."""
    split: Split = load_split(batches, what="judged")
    with torch.no_grad():
        outputs = [task.model(*inputs) for inputs in split.inputs()]
    return Judge(
        split,
        outputs,
        quality_loss=quality_function(task, outputs),
        by_target=False,
        metric=task.metric,
    )


def measure(judge: Judge, network: PeerNetwork) -> Measurement:
    """Quality of a peer's network on the judge's split."""
    model = network.model.eval()
    with torch.no_grad():
        return judge.measure(lambda inputs: model(*inputs))
