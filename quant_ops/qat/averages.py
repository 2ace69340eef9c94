"""Exponential moving averages of parameters."""

import torch
from torch import Tensor, nn


class Averages(nn.Module):
    """a_t = d_t a_(t-1) + (1 - d_t) p_t with d_t = min(decay, (1 + t) / (10 + t)), t from 1.

    The early rule forgets the start in short trainings.

    Args:
        module: whose trainable parameters are averaged.
        decay: d in the long run.
    """

    n_updates: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        parameters = dict(module.named_parameters())
        for position, name in enumerate(self._names):
            self.register_buffer(f"average{position}", parameters[name].detach().clone())
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present parameters."""
        self.n_updates += 1
        t = int(self.n_updates)
        weight = 1 - min(self._decay, (1 + t) / (10 + t))
        torch._foreach_lerp_(self._averages(), self._current(module), weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Set the module's parameters to the averages."""
        for parameter, average in zip(self._current(module), self._averages(), strict=True):
            parameter.copy_(average)

    def _averages(self) -> list[Tensor]:
        return [self.get_buffer(f"average{i}") for i in range(len(self._names))]

    def _current(self, module: nn.Module) -> list[Tensor]:
        named = dict(module.named_parameters())
        return [named[name] for name in self._names]
