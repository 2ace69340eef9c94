"""LIMPQ: one joint training of all steps, an integer program on them, a training at its widths."""

import numpy as np

from quant_ops.candidate import Candidate
from quant_ops.learned_widths.limpq import LIMPQ
from quant_ops.learned_widths.size import with_widths
from search.allocation import allocate
from search.strategies.gradient import GradientStrategy, traits_of
from search.strategies.gradient_settings import settings_with
from search.strategies.width_choice import WidthChoice
from search.strategies.width_learning import WidthLearning
from search.strategy import Context
from search.training.trainable import Trainable


class JointLearning(WidthLearning):
    """Trains steps of all widths; the widths come from an integer program on the steps.

    Differs from [Tang2022]: a step of the optimizer sees one width, in turn, then a random
    policy, instead of the sum over all, so that a step costs as much as any other method's. The
    importance of a group counts once for each of its weights: without that, small layers would
    take bits that large ones need.
    """

    def before_step(self, done: int) -> None:
        """Widths in turn, then a random policy."""
        for module in self.modules.values():
            assert isinstance(module, LIMPQ)
            turns: tuple[float | None, ...] = (*module.choices, None)
            module.select(turns[done % len(turns)])

    def harvest_bytes(self, number: int) -> int:
        """Evenly over the logarithm of the size, from the widest to the budget."""
        widest = self.context.size_of(self.choice.widest())
        share = number / (self.settings.harvest + 1)
        return max(self.budget_bytes, int(widest ** (1 - share) * self.budget_bytes**share))

    def chosen(self, budget_bytes: int) -> Candidate:
        """Least total importance within the budget; what is no code is taken off first."""
        losses, costs, places = [], [], []
        narrowest = {}
        for name, module in self.modules.items():
            assert isinstance(module, LIMPQ)
            layer = self.context.space.graph.layer_of[name]
            n_channels = np.bincount(module.group_of.cpu().numpy())
            widths = np.array(module.choices, dtype=np.float64)
            narrowest[name] = (module.choices[0],) * layer.out_channels
            for group, importance in enumerate(module.group_importance().cpu().numpy()):
                n_weights = layer.weights_per_channel * n_channels[group]
                losses.append(importance.astype(np.float64) * n_weights)
                costs.append(widths * n_weights / 8)
                places.append((name, group))
        start = with_widths(self.choice.widest(), narrowest)
        aside = self.context.size_of(start) - sum(float(cost[0]) for cost in costs)
        found = allocate(losses, {"size_bytes": costs}, {"size_bytes": budget_bytes - aside})
        if found is None:
            return start
        chosen = {place: at for place, at in zip(places, found, strict=True)}
        return with_widths(
            start,
            {
                name: tuple(module.choices[chosen[name, g]] for g in module.group_of.tolist())
                for name, module in self.modules.items()
            },
        )


class LIMPQStrategy(GradientStrategy):
    """Learned step sizes as sensitivity for the integer program [Tang2022]."""

    name = "limpq"
    traits = traits_of("one joint training of all widths, integer program on the learned steps")
    method = LIMPQ
    Settings = settings_with(LIMPQ)  # type: ignore[assignment]

    def learning(
        self, context: Context, trainable: Trainable, choice: WidthChoice, budget_bytes: int
    ) -> WidthLearning:
        """The first part for one size."""
        return JointLearning(self.method, self.settings, context, trainable, choice, budget_bytes)
