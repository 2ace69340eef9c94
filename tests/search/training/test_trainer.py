"""The training loop: better, resumable to the same codes, and sound where a loss is not finite."""

import json
from dataclasses import replace

import pytest
import torch

from quant_ops.errors import UsageError
from quant_ops.learned_widths.diffq import DiffQ
from quant_ops.packed import pack
from quant_ops.qat.network import QuantizedNetwork
from search.config import RunConfig
from search.evaluation import Evaluation
from search.prepare import prepare
from search.task import Task
from search.training.checkpoint import read_checkpoint, write_checkpoint
from search.training.device import training_device
from search.training.loader import EpochLoader, Position
from search.training.log import TrainingLog, read_log, training_figure
from search.training.objective import Objective
from search.training.pace import steps_within
from search.training.settings import OPTIMIZERS, TrainingSettings
from search.training.trainer import Hooks, Trainer, clipped

STEPS = 24


@pytest.fixture(scope="module")
def prepared(tiny_tasks):
    return prepare(tiny_tasks.cnn_training(), RunConfig())


def make(prepared, *, task=None, width=2, hooks=None, checkpoint=None, log=None, **settings):
    rate = OPTIMIZERS[settings.get("optimizer", "adamw")]
    settings = TrainingSettings(**{"steps": STEPS, "rate": rate, **settings})
    traced, batches = prepared.traced, prepared.spec.splits["calibration"].batches
    start = prepared.evaluator.bank.quantize(prepared.space.uniform(width))
    network = QuantizedNetwork(traced.graph, traced.params, start)
    if settings.norms:
        network.start_norms(traced.norms, batches)
    task = task or prepared.task
    objective = Objective(task, traced, settings, torch.device("cpu"))
    return Trainer(
        network, EpochLoader(task, 0), objective, settings,
        norm_batches=batches, hooks=hooks, checkpoint=checkpoint, log=log,
    )  # fmt: skip


def packed(trainer):
    return pack(trainer.run().to_model())


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 60},
        {"steps": 60, "norms": False, "optimizer": "sgd"},
        {"dampening": 1e-4, "freezing": 0.02, "average": 0.0},
        {"distill": 1.0, "precision": "bfloat16"},
        {"weights": "sawb", "folded_share": 0.0},
    ],
)  # fmt: skip
def test_the_quality_loss_comes_down(prepared, settings):
    evaluator = prepared.evaluator
    before = evaluator.measure(prepared.space.uniform(2)).loss
    model = make(prepared, **settings).run().to_model()
    assert evaluator.measure_model(model).loss < before


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 9, 16, 17, 20])
@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "sgd", "freezing": 0.05, "dampening": 1e-4}]
)
def test_killed_and_resumed_it_ends_with_the_same_codes(prepared, tmp_path, at, settings):
    whole = packed(make(prepared, log=tmp_path / "whole.jsonl", **settings))
    path, log = tmp_path / "checkpoint", tmp_path / "log.jsonl"

    def die(done):
        if done == at + 1:
            raise Killed

    trainer = make(prepared, checkpoint=path, log=log, hooks=Hooks(after_step=die), **settings)
    trainer.hooks = replace(
        trainer.hooks, on_progress=lambda done, *_: trainer.save() if done == at else None
    )
    with pytest.raises(Killed):
        trainer.run()
    resumed = make(prepared, checkpoint=path, log=log, **settings)
    assert at <= resumed.done < STEPS
    assert packed(resumed) == whole
    assert read_log(log) == read_log(tmp_path / "whole.jsonl")


def test_a_checkpoint_of_other_settings_is_refused(prepared, tmp_path):
    make(prepared, checkpoint=tmp_path / "c").save()
    with pytest.raises(UsageError, match=r"other settings \(distill\)"):
        make(prepared, checkpoint=tmp_path / "c", distill=0.25)


def test_training_twice_gives_the_same_codes_and_leaves_random_states(prepared):
    torch.manual_seed(5)
    first = packed(make(prepared))
    drawn = torch.rand(3)
    assert packed(make(prepared)) == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_sound_state(prepared):
    def spoil(network, share):
        if share >= 0.5:
            with torch.no_grad():
                network.trained_layers()["3.conv2"].latent[0, 0] = float("nan")
        return torch.zeros(()) * (float("nan") if share >= 0.5 else 1)

    trainer = make(prepared, hooks=Hooks(penalty=spoil))
    model = trainer.run().to_model()
    assert "step 13 of 24" in trainer.stopped
    assert "layer '3.conv2' first" in trainer.stopped
    assert all(torch.isfinite(t).all() for t in model.params().values())


def test_a_gradient_that_explodes_names_its_layer(prepared):
    trainer = make(prepared, norms=False, clip=0.0)
    layer = trainer.network.trained_layers()["5"]
    layer.latent.register_hook(lambda g: g * float("inf"))
    trainer.run()
    assert "step 1 of 24: the gradient is not finite, layer '5' first" in trainer.stopped


def test_a_price_on_widths_does_not_shrink_the_gradient_of_the_weights():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 2))
            self.widths = DiffQ.of(torch.ones(1, 2), legal=(0, 2, 8))

    def clipped_gradients(price):
        network = Network()
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, price)
        network.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clipped(network, 1.0)
        widths = torch.stack([p.grad for p in network.widths.parameters()])
        return network.weight.grad, float(widths.norm())

    for price in (1e-3, 1e6):
        weights, widths = clipped_gradients(price)
        assert torch.allclose(weights, torch.tensor([[0.6, 0.8]]), atol=1e-5)
        assert widths == pytest.approx(min(1.0, price * 2**0.5), rel=1e-4)


def test_a_task_without_labels_is_distilled(prepared, tiny_tasks):
    images, _ = tiny_tasks.digits_images()
    task = replace(prepared.task, training=lambda: [((images[i : i + 64],), None) for i in (0, 64)])
    before = prepared.evaluator.measure(prepared.space.uniform(2)).loss
    model = make(prepared, task=task).run().to_model()
    assert prepared.evaluator.measure_model(model).loss < before


def test_modules_are_told_how_far_the_training_is(prepared):
    told = []

    class Watcher(torch.nn.Identity):
        def progress(self, share):
            told.append(share)

    trainer = make(prepared)
    trainer.network.add_module("watcher", Watcher())
    trainer.run()
    assert told == [step / STEPS for step in range(STEPS)]


def test_a_random_loader_gives_an_epoch_again():
    x = torch.arange(12.0)[:, None]
    data = torch.utils.data.TensorDataset(x, x)

    def training():
        loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
        return (((a,), b) for a, b in loader)

    task = Task("t", torch.nn.Identity(), [], [], training=training)
    batches = EpochLoader(task, 1).batches(Position())
    seen = [next(batches) for _ in range(10)]
    assert [p for p, _ in seen][3:5] == [Position(0, 4), Position(1, 1)]
    again = EpochLoader(task, 1).batches(seen[5][0])
    for (position, ((a,), _)), (wanted, ((b,), _)) in zip(again, seen[6:], strict=False):
        assert position == wanted
        assert torch.equal(a, b)


def test_tasks_that_cannot_be_trained_on_say_why(prepared):
    with pytest.raises(UsageError, match="has no training data"):
        EpochLoader(replace(prepared.task, training=None), 0)
    empty = EpochLoader(replace(prepared.task, training=lambda: []), 0)
    with pytest.raises(UsageError, match="hold no batch"):
        next(empty.batches(Position()))
    with pytest.raises(UsageError, match="--device must be one of"):
        training_device("tpu")


def test_settings_out_of_range_are_refused():
    for wrong in (
        {"distill": 1.5},
        {"rate": 0.0},
        {"weights": "x"},
        {"steps": -1},
        {"inside": 0.5},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
            TrainingSettings(**wrong)


def test_a_time_becomes_steps(prepared, monkeypatch):
    monkeypatch.setattr("search.training.pace.seconds_per_step", lambda make, s: s.folded_share + 1)
    settings = TrainingSettings(folded_share=0.25)
    # three quarters at 1 s, a quarter at 2 s, nine tenths of 1,000 s
    assert steps_within(1000, lambda s: make(prepared), settings) in (719, 720)


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c"
    write_checkpoint(path, {"a:b": torch.ones(2)}, {"step": 3})
    tensors, state = read_checkpoint(path)
    assert torch.equal(tensors["a:b"], torch.ones(2))
    assert state["step"] == 3
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match="delete it"):
        read_checkpoint(path)


def test_the_log_survives_a_torn_line_and_becomes_a_picture(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path)
    for step in (10, 20, 30):
        log.add({"step": step, "loss": 1 / step, "rate": 0.1, "mean_bits": {"fc": 3.0}})
    path.write_text(path.read_text() + json.dumps({"step": 40})[:5])
    assert [row["step"] for row in TrainingLog(path, until=20).rows] == [10, 20]
    figure = training_figure(read_log(path), "trial 1")
    assert list(figure.data[0].x) == [10, 20]


def test_what_counts_as_trained():
    candidate = None
    for recipe, trained in {"": False, "fast": False, "full": False, "finetune": True}.items():
        assert Evaluation(candidate, 0.0, None, {}, recipe=recipe).is_trained is trained
