"""A ResNet-20 that has seen neither calibration nor validation images, and the task around it.

    python studies/clean_resnet.py --data DATA --out clean-resnet20.th [--device cuda]
    BITFRONT_CLEAN=clean-resnet20.th search run --task studies/clean_resnet.py:clean_resnet20 ...

The built-in task's checkpoint was trained on all 50,000 training images, its validation images
among them, so that labels there say little. This one is trained from scratch on the other 43,976
by the recipe of [He2016, sec. 4.2] with a cosine schedule, 200 --epochs, meant for a GPU. A
checkpoint is written after every epoch and a killed training goes on from it.
"""

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from quant_ops.errors import UsageError
from search.data import channels_last
from search.task import Task
from search.tasks.cifar10 import load_checkpoint, make_resnet20
from search.tasks.models import CifarResNet
from search.tasks.training import accuracy, seeded
from search.training.device import training_device

RATE, DECAY, WARM_UP_STEPS = 0.1, 5e-4, 400
VARIABLE = "BITFRONT_CLEAN"


def clean_resnet20(*, data: Path | None = None, seed: int = 0) -> Task:
    """The built-in task with the weights in the file that BITFRONT_CLEAN names.

    Raises:
        UsageError: the variable is not set, or there is no such file.
    """
    path = os.environ.get(VARIABLE, "")
    if not Path(path).is_file():
        raise UsageError(
            f"{VARIABLE} must name the checkpoint of `python studies/clean_resnet.py --out FILE`, "
            f"but it is {path!r}; set it"
        )
    task = make_resnet20(data=data, seed=seed)
    assert isinstance(task.model, nn.Module)
    load_checkpoint(task.model, Path(path))
    return replace(task, name="clean-resnet20", validation_seen_in_training=False)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--stop-after", type=int, default=0, help="epochs of this call; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = training_device(arguments.device)
    task = make_resnet20(data=arguments.data, seed=arguments.seed)
    model = seeded(lambda: CifarResNet(20), arguments.seed)
    model = model.to(device, memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        RATE,
        momentum=0.9,
        nesterov=True,
    )
    state_path = arguments.out.with_suffix(".state")
    done = 0
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        done = state["epochs"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    last = min(arguments.epochs, done + (arguments.stop_after or arguments.epochs))
    for epoch in range(done, last):
        started = time.monotonic()
        loss = train_epoch(model, optimizer, task, epoch, arguments.epochs, device)
        state = {
            "epochs": epoch + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, state_path)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    model = model.cpu().eval()
    torch.save(model.state_dict(), arguments.out)
    print(f"validation {100 * accuracy(model, list(task.validation)):.2f} %, {arguments.out}")


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    epoch: int,
    n_epochs: int,
    device: torch.device,
) -> float:
    """One epoch by number, so that a resumed training meets the same batches; its mean loss."""
    total, steps = 0.0, 43_976 // 128
    scheduled = steps * n_epochs
    model.train()
    for number, ((images,), labels) in enumerate(task.training.epoch(epoch)):
        step = epoch * steps + number
        cosine = (1 + math.cos(math.pi * step / scheduled)) / 2
        rate = RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(channels_last(images.to(device, non_blocking=True)))
        loss = functional.cross_entropy(outputs.float(), labels.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total / steps


if __name__ == "__main__":
    main()
