"""A task of one's own: a small network on scikit-learn's wine data."""

import torch
from sklearn.datasets import load_wine

from search.task import Task


def make_task():
    data = load_wine()
    x = torch.tensor(data.data, dtype=torch.float32)
    x, y = (x - x.mean(dim=0)) / x.std(dim=0), torch.tensor(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, held_out = order[:100], order[100:]

    model = torch.nn.Sequential(torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()

    def batches(rows):
        return [((x[rows],), y[rows])]  # a list of ((input, ...), target); a DataLoader will do

    return Task("wine", model.eval(), calibration=batches(train), validation=batches(held_out))
