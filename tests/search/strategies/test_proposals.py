"""Genomes are narrowed until budgets hold; the narrowest candidate need not be the cheapest."""

import numpy as np

from search.strategies.proposals import repair
from search.testing import AdditiveTask, FakeContext


class Slow(FakeContext):
    """One unit of time a layer, three for a narrow one; never a multiplier."""

    def cost_of(self, candidate):
        widths = [quant.bit_widths[0] for _, quant in candidate.layers]
        time = sum(3.0 if width < 3 else 1.0 for width in widths)
        return {**super().cost_of(candidate), "time": time, "dsp": 0.0}


def test_a_limit_of_zero_is_no_reason_to_fail():
    task = AdditiveTask.make(n_layers=6, seed=0)
    context = Slow(task, {"time": 8.0, "dsp": 0.0}, trials=4, batch_size=2)
    narrowest = context.space.encode(context.space.smallest())
    found = repair(context, narrowest, np.random.default_rng(0))
    costs = context.cost_of(context.space.decode(found))
    assert costs["time"] <= 8.0
    assert costs["dsp"] == 0.0
