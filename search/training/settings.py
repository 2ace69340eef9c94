"""How a network is trained at given widths: `--set finetune.KEY=VALUE`."""

import math
from dataclasses import dataclass

from quant_ops.qat.activations import RULES as ACTIVATION_RULES
from quant_ops.qat.weights import RULES as WEIGHT_RULES

SETTINGS_OF = "finetune"
OPTIMIZERS = {"adamw": 1e-3, "sgd": 2e-2}  # and the peak rate of a long training with each
# A short training has no time to mend what a high rate breaks in a recovered network: ResNet-20
# got worse within 100 steps at 3e-4 and better at 1e-4.
LONG_STEPS = 10_000
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """One recipe: there is no choice among checkpoints, the last state is the result.

    Attributes:
        steps: of the optimizer for each point; 0 takes what fits into the time of --finetune.
        optimizer: "adamw" or "sgd" (Nesterov momentum 0.9).
        rate: peak learning rate, falling to 0 as half a cosine; None is 1e-3 (adamw) or 2e-2 (sgd)
            from 10,000 steps on, with fewer times the square root of their share.
        step_rate: of quantizer steps and gammas, in units of `rate`.
        width_rate: of what decides on learned widths, in units of `rate`.
        weight_decay: of latent weights and, under a pact rule, of clips.
        warm_up: share of the steps in which the rate rises.
        clip: largest norm of the gradient; 0 clips nothing.
        distill: share of the distillation from the float network in the loss; 1 uses no label.
        temperature: of the distillation.
        norms: give folded batch norms back for the first part.
        folded_share: the last part, in which they are folded and what is packed is trained.
        average: long-run decay of the averaged weights, which are the result; 0 takes the last.
        dampening: weight of the pull towards levels at the end, from 0 as half a cosine.
        freezing: oscillation frequency above which a weight is frozen at the end, from 1 as half
            a cosine; 1 freezes none.
        weights, activations: rules, see `quant_ops.qat.weights` and `quant_ops.qat.activations`.
        inside: how far from its code, in steps, a weight that was rounded to another level starts.
        swaps: how often widths move by one step between channels, at equal bytes, in as many
            equal parts of the training, each with a rate that falls to 0.
        reestimate: set mean and spread of every channel to the float network's at the end.
        last_epochs: of label-free distillation of scales and biases over the calibration data.
        checkpoint_s: seconds between checkpoints: what a killed training loses at most.
        precision: of the forward and backward pass; auto is float32 on a CPU, bfloat16 on a GPU.
    """

    steps: int = 0
    optimizer: str = "adamw"
    rate: float | None = None
    step_rate: float = 1.0
    width_rate: float = 1.0
    weight_decay: float = 1e-4
    warm_up: float = 0.05
    clip: float = 1.0
    distill: float = 0.5
    temperature: float = 2.0
    norms: bool = True
    folded_share: float = 0.3
    average: float = 0.999
    dampening: float = 0.0
    freezing: float = 1.0
    weights: str = "lsq"
    activations: str = "lsq"
    inside: float = 0.49
    swaps: int = 0
    reestimate: bool = False
    last_epochs: float = 0.0
    precision: str = "auto"
    checkpoint_s: float = 30.0

    def __post_init__(self) -> None:
        chosen = {
            "optimizer": (self.optimizer, tuple(OPTIMIZERS)),
            "weights": (self.weights, WEIGHT_RULES),
            "activations": (self.activations, ACTIVATION_RULES),
            "precision": (self.precision, PRECISIONS),
        }
        for name, (value, legal) in chosen.items():
            if value not in legal:
                raise ValueError(f"{name} must be one of {', '.join(legal)}, got {value!r}")
        shares = ("warm_up", "distill", "folded_share", "average", "freezing")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("steps", "clip", "dampening", "last_epochs", "weight_decay", "swaps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.temperature <= 0 or (self.rate is not None and self.rate <= 0):
            raise ValueError("temperature and rate must be above 0")
        if not 0 <= self.inside < 0.5:
            raise ValueError(f"inside must be at least 0 and below 0.5, got {self.inside}")

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up.

        >>> TrainingSettings(steps=100).peak_rate, TrainingSettings(steps=40_000).peak_rate
        (0.0001, 0.001)
        """
        if self.rate is not None:
            return self.rate
        return OPTIMIZERS[self.optimizer] * math.sqrt(min(1.0, self.steps / LONG_STEPS))

    @property
    def fold_at(self) -> int:
        """The step before which norms are folded."""
        return self.steps - round(self.folded_share * self.steps) if self.norms else 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise, then half a cosine to 0.

        >>> s = TrainingSettings(steps=100, rate=1.0, warm_up=0.1)
        >>> s.rate_at(0), s.rate_at(9), round(s.rate_at(55), 3)
        (0.1, 1.0, 0.5)
        """
        rising = round(self.warm_up * self.steps)
        if step < rising:
            return self.peak_rate * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.peak_rate * (1 + math.cos(math.pi * share)) / 2

    def grown(self, target: float, step: int, start: float = 0.0) -> float:
        """From `start` to `target` as half a cosine over the training."""
        share = (1 - math.cos(math.pi * step / max(1, self.steps))) / 2
        return start + (target - start) * share
