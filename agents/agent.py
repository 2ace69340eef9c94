"""What the agents of the strategy table have in common."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from agents.campaign import AgentSettings, Campaign
from agents.controllers import seeded
from agents.pilot import Pilot, Scope
from agents.policy_store import check_policy, load_policy, save_policy
from agents.problem import Problem, require_prunable
from agents.wall import Wall
from search.space import SearchSpace
from search.strategy import Context, Strategy


class AgentStrategy(Strategy):
    """A learned policy.

    Attributes:
        scope: what its controllers decide.
        wall: order of the budget wall.
    """

    scope: ClassVar[Scope]
    wall: ClassVar[str] = "bits"

    @dataclass(frozen=True, slots=True)
    class Settings(AgentSettings):
        """See `AgentSettings`."""

    settings: Settings

    def check(self, space: SearchSpace) -> None:
        if self.scope.prune:
            require_prunable(space, self.name, "haq or rate-distortion")
        if self.settings.policy:
            check_policy(Path(self.settings.policy), self.scope, self.name)

    def run(self, context: Context) -> None:
        problem = Problem.of(
            context, self.settings.importance, self.settings.groups, tilt=self.settings.tilt
        )
        self.keep_ranking(context, problem)
        pilot = self.pilot(context, self.scope)
        campaign = Campaign(context, problem, pilot, Wall(problem, self.wall), self.settings)
        try:
            campaign.run(self.name)
        finally:
            save_policy(pilot, context.folder("agents") / f"{self.name}-policy", self.name)

    def pilot(self, context: Context, scope: Scope) -> Pilot:
        """New controllers, or those of the policy that was asked for."""
        with seeded(context.seed, 0, self.name, "make"):
            if self.settings.policy:
                return load_policy(Path(self.settings.policy), scope, self.name)
            return Pilot(scope, self.settings.algorithm, self.settings.hidden)

    def keep_ranking(self, context: Context, problem: Problem) -> None:
        """What `search show --trial` explains decisions by."""
        path = context.folder("agents") / f"{self.name}-importance.json"
        path.write_text(json.dumps(problem.importance.to_json()) + "\n")
