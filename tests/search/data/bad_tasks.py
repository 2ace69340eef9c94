"""Tasks that cannot be used, each for one reason."""

import torch
from torch import nn

from search.task import Metric, Task


def _task(model, **changes):
    x, y = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    fields = {"calibration": [((x,), None)], "validation": [((x,), y)]} | changes
    return Task("bad", model.eval(), **fields)


def _linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def raises():
    return _task(_linear().no_such_method())


def no_validation():
    return _task(_linear(), validation=[])


def no_calibration():
    return _task(_linear(), calibration=[])


def not_a_task():
    return _linear()


def one_shot_validation():
    return _task(_linear(), validation=iter([((torch.randn(4, 6),), torch.zeros(4))]))


def not_a_number():
    model = _linear()
    with torch.no_grad():
        model[2].weight[1, 3] = float("nan")
    return _task(model)


def infinite_inputs():
    x = torch.full((8, 6), float("inf"))
    return _task(_linear(), validation=[((x,), torch.zeros(8, dtype=torch.int64))])


class _Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        if x.sum() > 0:  # decided by values: torch.export cannot follow
            return self.linear(x)
        return self.linear(-x)


def branching():
    return _task(_Branching())


class _Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.linalg.inv(x.unsqueeze(-1) @ x.unsqueeze(-2) + 1).sum(dim=2))


def unknown_operator():
    return _task(_Sorting())


class _Weightless(nn.Module):
    def forward(self, x):
        return x[:, :3]


def nothing_to_quantize():
    return _task(_Weightless())


def wrong_metric():
    metric = Metric("broken", lambda outputs, target: torch.zeros(2, 2))
    return _task(_linear(), metric=metric)


def raising_metric():
    def function(outputs, target):
        raise RuntimeError("the metric of this task is broken")

    return _task(_linear(), metric=Metric("broken", function))


def other_checkpoint():
    """Weights of another architecture."""
    model = _linear()
    model.load_state_dict(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).state_dict())
    return _task(model)


def wrong_inputs():
    return _task(_linear(), validation=[((torch.randn(4, 7),), torch.zeros(4, dtype=torch.int64))])
