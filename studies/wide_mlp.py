"""A task whose layers are wide: digits through 1,024 units, for timings of linear layers.

search run --task studies/wide_mlp.py:make_task --bits 4 --activation-bits 8 --strategy uniform
"""

import itertools

import torch
from sklearn.datasets import load_digits
from torch import nn

from search.task import Task

WIDTH, STEPS = 1024, 60


def make_task() -> Task:
    """64-1024-1024-1024-10 on scikit-learn's digits, trained for a few seconds."""
    data = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    sizes = (64, WIDTH, WIDTH, WIDTH)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        rows = torch.randint(0, 1000, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return Task(
        "wide-mlp",
        model.eval(),
        calibration=[((images[:256],), None)],
        validation=[((images[1000:],), labels[1000:])],
    )
