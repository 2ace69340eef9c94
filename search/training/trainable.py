"""What a strategy that trains gets: the network and its data, made ready for the trainer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant_ops.bank import WeightBank
from quant_ops.calibration import Calibration, calibrate
from quant_ops.candidate import Candidate
from quant_ops.correction import reestimate_norms
from quant_ops.edges import activation_edges
from quant_ops.graph import Params
from quant_ops.layout import to_canonical
from quant_ops.qat.network import QuantizedNetwork
from quant_ops.quantized import QuantizedModel
from search.capture import Traced
from search.context import Listener, RunContext
from search.prepare import Prepared
from search.record import Record
from search.settings import settings_of
from search.task import Batch
from search.training.device import training_device
from search.training.loader import EpochLoader
from search.training.log import LOGS, TRAINED
from search.training.objective import Objective
from search.training.settings import SETTINGS_OF, TrainingSettings
from search.training.trainer import Hooks, Trainer


@dataclass(frozen=True)
class Trainable:
    """The task of a run as something to train.

    Attributes:
        prepared: the task, its traced network and its data.
        settings: the recipe, `--set finetune.KEY=VALUE`.
        seconds: for everything that the strategy trains; None where no time was given.
        logs: folder of the training logs.
        listener: told of progress.
        note: keeps facts beside a trial, (trial, facts).
    """

    prepared: Prepared
    settings: TrainingSettings
    seconds: float | None
    logs: Path
    listener: Listener
    note: Callable[[int, Mapping[str, Any]], None]

    @classmethod
    def of(cls, prepared: Prepared, context: RunContext, record: Record) -> "Trainable":
        """That of a run.

        Raises:
            UsageError: the task has no training data, or there is no such device.
        """
        config = prepared.config
        EpochLoader(prepared.task, config.seed)
        training_device(config.device)
        return cls(
            prepared,
            settings_of(TrainingSettings, config.settings, SETTINGS_OF),
            context.seconds_left if config.time_limit_s is not None else config.finetune_s,
            context.run_folder / LOGS,
            context.listener,
            lambda trial, facts: record.add_fact(trial, TRAINED, dict(facts)),
        )

    @property
    def traced(self) -> Traced:
        """The folded network, float parameters and norms."""
        return self.prepared.traced

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return training_device(self.prepared.config.device)

    @property
    def norm_batches(self) -> Iterable[Batch]:
        """Calibration data, on which norms are estimated."""
        return self.prepared.spec.splits["calibration"].batches

    def quantized(self, params: Params, candidate: Candidate) -> QuantizedModel:
        """Trained float parameters at the widths of a candidate, codes chosen as in a search.

        Ranges, bias correction and the mean and spread of every channel come from the calibration
        inputs as the trained network sees them.
        """
        bank, calibration = self.bank(params)
        return self.rounded(bank, calibration, candidate)

    def bank(self, params: Params) -> tuple[WeightBank, Calibration]:
        """What chooses codes of trained float parameters, and what these make of the inputs."""
        spec, graph = self.prepared.spec, self.traced.graph
        edges = {edge.name: edge.node for edge in activation_edges(graph)}
        calibration = calibrate(graph, params, self.norm_batches, edges=edges)
        bank = WeightBank(
            graph,
            params,
            calibration,
            range_setter=spec.range_setter,
            activation_ranges=spec.activation_ranges,
            bias_correction=spec.correction != "none",
            spread_correction=spec.correction == "mean-spread",
        )
        return bank, calibration

    def rounded(
        self, bank: WeightBank, calibration: Calibration, candidate: Candidate
    ) -> QuantizedModel:
        """A candidate's codes with the mean and spread of every channel corrected."""
        return reestimate_norms(bank.quantize(candidate), calibration, self.norm_batches)

    def network(
        self,
        start: QuantizedModel,
        settings: TrainingSettings,
        *,
        params: Params | None = None,
        quantizers: Mapping[str, nn.Module] | None = None,
    ) -> QuantizedNetwork:
        """The network to train, with its norms back where the recipe wants them.

        Args:
            start: widths, codes, ranges and biases to start from; its graph is trained.
            settings: the recipe.
            params: float parameters of that graph, if not those of the float network.
            quantizers: see `QuantizedNetwork`.
        """
        network = QuantizedNetwork(
            start.graph,
            self.traced.params if params is None else params,
            start,
            quantizers=quantizers,
            weight_rule=settings.weights,
            activation_rule=settings.activations,
            inside=settings.inside,
        )
        if settings.norms:
            for module in (quantizers or {}).values():
                module.eval()  # norms start without a relaxation's noise
            network.start_norms(self.traced.norms, self.norm_batches)
        return network.to(self.device)

    def trainer(
        self,
        network: QuantizedNetwork,
        settings: TrainingSettings,
        *,
        checkpoint: Path | None = None,
        log: Path | None = None,
        hooks: Hooks | None = None,
    ) -> Trainer:
        """A trainer of a network on this task's data; see `Trainer`."""
        task, config = self.prepared.task, self.prepared.config
        return Trainer(
            network,
            EpochLoader(task, config.seed),
            Objective(task, self.traced, settings, self.device),
            settings,
            norm_batches=self.norm_batches,
            checkpoint=checkpoint,
            log=log,
            hooks=hooks,
        )


def float_weight_rows(traced: Traced, params: Mapping[str, Tensor], name: str) -> Tensor:
    """A layer's float weight, (out_channels, weights of one channel)."""
    layer = traced.graph.layer_of[name]
    return to_canonical(layer, params[layer.weight].detach()).reshape(layer.out_channels, -1)
