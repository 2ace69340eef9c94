"""AJPQ: a layer controller and a channel controller prune and quantize in one step."""

from agents.agent import AgentStrategy
from agents.pilot import Scope
from search.strategy import Traits


class AJPQ(AgentStrategy):
    """Pruning a channel is giving it 0 bits: one hierarchical agent decides both [Tang2020].

    The layer controller acts once per layer: how much of it goes, and the mean width of what
    stays. The channel controller acts on rank groups of the survivors, widths non-decreasing
    with importance. Both rank by the same importance, which also decides until something is
    learned: an action of 0 shares the bits out by it. The paper's body is not public; what is not
    in its abstract is ours, see REFERENCES.md.
    """

    name = "ajpq"
    traits = Traits(
        "layer controller prunes, channel controller sets widths of rank groups, one step",
        granularity=("group", "channel"),
        activations=False,
        cost_per_trial="O(steps) gradient steps per batch",
    )
    scope = Scope()
