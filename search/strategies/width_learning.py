"""The part of a training in which widths are learned, and the points recorded on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quant_ops.candidate import Candidate
from quant_ops.learned_widths.base import LearnedWidths
from quant_ops.learned_widths.controller import SizeController
from quant_ops.learned_widths.size import ExpectedSize
from quant_ops.qat.network import QuantizedNetwork
from search.atomic import write_text
from search.space import LayerChoice
from search.strategies.gradient_settings import GradientSettings, method_settings
from search.strategies.width_choice import WidthChoice
from search.strategy import Context
from search.training.loader import random_states_kept
from search.training.settings import TrainingSettings
from search.training.trainable import Trainable, float_weight_rows
from search.training.trainer import Hooks, Trainer

if TYPE_CHECKING:
    from search.strategies.gradient import Point

HARVEST = "harvest"  # recipes of points recorded on the way end so
# in units of a width's parameter per step: the controller cannot hold what jumps faster
FASTEST = 0.1


class WidthLearning:
    """Learns the widths of one size.

    Args:
        method: of learning widths.
        settings: of the strategy.
        context: records harvested points.
        trainable: network and data.
        choice: what is learned, and the final fill.
        budget_bytes: where the size is to end.
    """

    modules: dict[str, LearnedWidths]
    network: QuantizedNetwork

    def __init__(
        self,
        method: type[LearnedWidths],
        settings: GradientSettings,
        context: Context,
        trainable: Trainable,
        choice: WidthChoice,
        budget_bytes: int,
    ) -> None:
        self.method, self.settings = method, settings
        self.context, self.trainable, self.choice = context, trainable, choice
        self.budget_bytes = budget_bytes
        self._harvested: dict[str, int] = {}
        self._harvested_path: Path | None = None
        self._expected_bytes = 0.0
        self._best = ""

    def trainer(
        self,
        start: "Point",
        settings: TrainingSettings,
        *,
        checkpoint: Path | None = None,
        log: Path | None = None,
        harvests: bool = True,
    ) -> Trainer:
        """A trainer of the network whose weights go through the method's modules."""
        per_step = min(self.settings.travel / settings.steps, FASTEST)
        settings = replace(settings, width_rate=per_step / settings.peak_rate)
        widest = self.choice.widest()
        self.modules = self._modules(start)
        model = self.trainable.prepared.evaluator.bank.quantize(widest)
        self.network = self.trainable.network(
            model, settings, params=start.params, quantizers=self.modules
        )
        # children of the network, so that checkpoints hold them
        self.expected = ExpectedSize(self.choice.context.space.graph, widest)
        self.controller = SizeController(self.budget_bytes)
        for name, module in {"expected": self.expected, "controller": self.controller}.items():
            self.network.add_module(name, module.to(self.trainable.device))
        generator = torch.Generator(self.trainable.device)
        for module in self.modules.values():
            module.generator = generator
        total = settings.steps
        every = total / (self.settings.harvest + 1)
        stops = {max(1, round(every * k)): k for k in range(1, self.settings.harvest + 1)}

        def after_step(done: int) -> None:
            # a resumed training draws the noise of the one that was not interrupted
            generator.manual_seed(self.context.seed * 1_000_003 + done)
            if harvests and done in stops and done < total:
                with random_states_kept():
                    self._harvest(stops[done])
            self.before_step(done)

        trainer = self.trainable.trainer(
            self.network,
            settings,
            checkpoint=checkpoint,
            log=log,
            hooks=Hooks(self._penalty, after_step, self._on_progress),
        )
        generator.manual_seed(self.context.seed * 1_000_003 + trainer.done)
        self.before_step(trainer.done)
        return trainer

    def remember(self, path: Path) -> None:
        """Keep in a file which points are recorded; a resumed training does not do so again."""
        self._harvested_path = path
        self._harvested = json.loads(path.read_text()) if path.exists() else {}

    def before_step(self, done: int) -> None:
        """Called with the number of steps done."""

    def chosen(self, budget_bytes: int) -> Candidate:
        """The discrete widths now; a method whose widths are not learned asks for a budget."""
        return self.choice.chosen(self.modules)

    def final(self) -> Candidate:
        """The widths at the end, filled up to the budget."""
        return self.choice.filled(self.chosen(self.budget_bytes), self.budget_bytes)

    def harvest_bytes(self, number: int) -> int:
        """The size of a point recorded on the way: what the widths are worth now."""
        return max(self.budget_bytes, int(self.expected.of(self.modules)))

    def _modules(self, start: "Point") -> dict[str, LearnedWidths]:
        settings = method_settings(self.method, self.settings)
        out = {}
        for choice in self.choice.layers:
            weight = float_weight_rows(self.trainable.traced, start.params, choice.name)
            group = self._group(choice, len(weight))
            widths = start.candidate.assignment[choice.name].per_channel(len(weight))
            parts = [widths[i : i + group] for i in range(0, len(weight), group)]
            out[choice.name] = self.method.of(
                weight,
                legal=choice.bit_widths,
                group=group,
                start=[sum(part) / len(part) for part in parts],
                settings=settings,
            )
        return out

    def _group(self, choice: LayerChoice, n_channels: int) -> int:
        if self.context.space.finest == "layer":
            return n_channels
        if self.settings.group:
            return self.settings.group
        return len(choice.groups[0]) if choice.groups else self.method.usual_group

    def _penalty(self, _: nn.Module, share: float) -> Tensor:
        total = torch.stack([m.penalty() for m in self.modules.values()]).sum()
        if not self.method.learns:
            return total
        size = self.expected.of(self.modules)
        self._expected_bytes = float(size.detach())
        term: Tensor = self.controller(size, share)
        return total + term

    def _harvest(self, number: int) -> None:
        """Record what the widths now would be as a file; the expected size is exact there."""
        with torch.no_grad():
            budget = self.harvest_bytes(number)
            candidate = self.choice.filled(self.chosen(budget), budget)
            self.expected.refresh(candidate)
        if str(number) in self._harvested or self.context.should_stop():
            return
        model = self.trainable.quantized(self._float_params(), candidate)
        evaluation = self.context.submit(
            candidate, model, recipe=f"{self.context.strategy} {HARVEST}"
        )
        self._harvested[str(number)] = evaluation.trial
        if self._harvested_path is not None:
            write_text(self._harvested_path, json.dumps(self._harvested) + "\n")
        if evaluation.metric is not None:
            self._best = f", last point {evaluation.metric:.4g}"

    def _float_params(self) -> dict[str, Tensor]:
        """Folded with the norms of the discrete widths; the training's own norms stay."""
        norms = [n for layer in self.network.trained_layers().values() if (n := layer.norm)]
        kept = [(norm.mean.clone(), norm.var.clone()) for norm in norms]
        self.network.eval()
        self.network.estimate_norms(self.trainable.norm_batches)
        found = self.network.float_params()
        for norm, statistics in zip(norms, kept, strict=True):
            norm.restart(*statistics)
        self.network.train()
        return found

    def _on_progress(self, done: int, total: int, loss: float) -> None:
        size = f", expected {self._expected_bytes:,.0f} bytes" if self._expected_bytes else ""
        self.trainable.listener.on_step(done, total, f"loss {loss:.4g}{size}{self._best}")
