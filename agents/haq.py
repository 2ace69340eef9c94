"""HAQ: one flat agent sets a width per layer under a hard budget."""

from dataclasses import dataclass

from agents.agent import AgentStrategy
from agents.pilot import Scope
from search.strategy import Traits


class HAQ(AgentStrategy):
    """One DDPG agent, one step per layer [Wang2019].

    Differs: the action is read relative to the bits that are left, the width it stands for is
    clipped to legal ones; losses are compared with rate-distortion at equal bytes; proposals are
    screened as those of every agent here. The wall is theirs: from the last layer to the first,
    one bit at a time.
    """

    name = "haq"
    traits = Traits(
        "one flat DDPG agent, a width per layer, hard budget",
        granularity=("layer",),
        activations=False,
        cost_per_trial="O(steps) gradient steps per batch",
    )
    scope = Scope(prune=False, by_channel=False)
    wall = "layers"

    @dataclass(frozen=True, slots=True)
    class Settings(AgentStrategy.Settings):
        """See `AgentSettings`; importance has no part in the paper, so that `tilt` is 0."""

        tilt: float = 0.0

    settings: Settings
