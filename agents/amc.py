"""AMC: one agent prunes channels; what stays keeps its widest width."""

from agents.agent import AgentStrategy
from agents.pilot import Scope
from search.strategy import Traits


class AMC(AgentStrategy):
    """One agent, one sparsity per layer [He2018].

    Differs: layers that are tied keep consistent by a shared ranking, where the paper's code is
    for chains; the budget is held by the wall instead of by limits on each action; remaining
    weights are not fitted again.
    """

    name = "amc"
    traits = Traits(
        "one agent, a sparsity per layer, widths untouched",
        granularity=("group", "channel"),
        activations=False,
        cost_per_trial="O(steps) gradient steps per batch",
    )
    scope = Scope(widths=False, by_channel=False)
    wall = "channels"
