"""Tasks that train in about a second: what the end-to-end tests give to `--task`."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_wine
from torch import nn

from search.task import Metric, Task

READS = "TINY_TASK_READS"  # environment variable: a file that gets a line per read of a test split


def digits_images():
    """(1797, 1, 8, 8) in [0, 1] and their labels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(data.target)[order]


def train(model, inputs, targets, loss, *, steps, rate=0.01):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(targets), (64,), generator=generator)
        optimizer.zero_grad()
        loss(model(*(x[rows] for x in inputs)), targets[rows]).backward()
        optimizer.step()
    return model.eval()


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Residual(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def cnn():
    """A residual network on digits; reads of its test split are counted in `$TINY_TASK_READS`."""
    images, labels = digits_images()
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy
    model = train(small_cnn(), (images[:1000],), labels[:1000], loss, steps=150)

    def test():
        if READS in os.environ:
            with Path(os.environ[READS]).open("a") as file:
                file.write("read\n")
        return [((images[1400:],), labels[1400:])]

    return Task(
        "tiny-cnn",
        model,
        calibration=[((images[:128],), None)],
        validation=[((images[1000:1400],), labels[1000:1400])],
        test=test,
    )


class _Shuffled:
    """Training batches in an order of their own in each epoch."""

    def __init__(self, images, labels):
        self._images, self._labels = images, labels
        self._epoch = -1

    def __call__(self):
        self._epoch += 1
        return self.epoch(self._epoch)

    def epoch(self, number):
        generator = torch.Generator().manual_seed(number)
        for rows in torch.randperm(960, generator=generator).reshape(-1, 64):
            yield (self._images[rows],), self._labels[rows]


def cnn_training():
    """`cnn` with the data it was trained on."""
    images, labels = digits_images()
    return replace(cnn(), name="tiny-training", training=_Shuffled(images, labels))


def cnn_other_weights():
    """The same data and architecture as `cnn`, other weights."""
    task = cnn()
    with torch.no_grad():
        task.model[-1].bias += 0.01
    return task


def cnn_other_data():
    """The same network as `cnn`, other validation images."""
    images, labels = digits_images()
    task = cnn()
    validation = [((images[1100:1500],), labels[1100:1500])]
    return Task(task.name, task.model, task.calibration, validation)


def mlp():
    """Wine; no test split."""
    data = load_wine()
    x = torch.tensor(data.data, dtype=torch.float32)
    x, y = (x - x.mean(dim=0)) / x.std(dim=0), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    model = train(layers, (x[:100],), y[:100], nn.functional.cross_entropy, steps=100)
    batches = [((x[100:],), y[100:])]
    return Task("tiny-mlp", model, calibration=[((x[:100],), None)], validation=batches)


def mlp_training():
    """`mlp`, trained towards its float self: there are no labels."""
    task = mlp()
    return replace(task, name="tiny-mlp-training", training=lambda: iter(task.calibration))


class Zoo(nn.Module):
    """Two inputs, a dict of outputs, and one of every kind of layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.conv1d = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.conv3d = nn.Conv3d(1, 4, (3, 3, 3), padding=1, stride=(2, 1, 1))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.shared = nn.Linear(14, 14)
        self.classes = nn.Linear(14, 3)
        self.amount = nn.Linear(14, 1)

    def forward(self, image, tokens):
        words = self.conv1d(self.embedding(tokens).transpose(1, 2)).relu()
        words, _ = self.lstm(words.transpose(1, 2))
        x = self.stem(image).relu()
        x = torch.cat([self.depthwise(x), self.norm(self.grouped(x))], dim=1)
        x = self.conv3d(x.unsqueeze(1)).relu().mean(dim=1)
        x = self.up(x).relu().mean(dim=(2, 3))
        joined = torch.cat([x, words.mean(dim=1), x], dim=1)
        hidden = self.shared(joined).relu()
        hidden = self.shared(hidden).relu()
        return {"classes": self.classes(hidden), "amount": self.amount(hidden).squeeze(1)}


def _class_is_right(outputs, target):
    return (outputs["classes"].argmax(dim=1) == target).double()


def zoo():
    """Random weights; labels are the float model's own answers, so its accuracy is 1."""
    torch.manual_seed(0)
    model = Zoo().eval()
    images, tokens = torch.randn(96, 1, 8, 8), torch.randint(0, 12, (96, 5))
    with torch.no_grad():
        labels = model(images, tokens)["classes"].argmax(dim=1)
    return Task(
        "tiny-zoo",
        model,
        calibration=[((images[:32], tokens[:32]), None)],
        validation=[((images[32:], tokens[32:]), labels[32:])],
        metric=Metric("top-1", _class_is_right, percent=True),
    )


def zoo_training():
    """`zoo`, trained towards its float self."""
    task = zoo()
    return replace(task, name="tiny-zoo-training", training=lambda: iter(task.calibration))


def _r_squared(outputs, target):
    residual = (outputs.squeeze(1) - target).square().sum()
    return float(1 - residual / (target - target.mean()).square().sum())


def regression():
    """A smooth function; the metric is of the whole split, the loss a relative error."""
    torch.manual_seed(0)
    x = torch.rand(400, 6) * 2 - 1
    y = (3 * x[:, 0]).sin() + x[:, 1] * x[:, 2] + 0.5 * x[:, 3]

    def loss(outputs, target):
        return nn.functional.mse_loss(outputs.squeeze(1), target)

    layers = nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)
    )
    model = train(layers, (x[:300],), y[:300], loss, steps=300)
    return Task(
        "tiny-regression",
        model,
        calibration=[((x[:100],), None)],
        validation=[((x[300:],), y[300:])],
        metric=Metric("R2", _r_squared, per_sample=False),
        quality_loss="relative-error",
    )
