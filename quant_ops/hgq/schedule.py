"""The price of an EBOP over a run: raised log-linearly, or steered to a target."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LogLinearBeta:
    """beta = start * (end / start) ^ share, after `hold` of the run at `start` [Sun2024].

    >>> schedule = LogLinearBeta(1e-6, 1e-4)
    >>> [f"{schedule(share):.0e}" for share in (0.0, 0.5, 1.0)]
    ['1e-06', '1e-05', '1e-04']

    One long run along it passes every price, so that each point of the front is met on the way.
    """

    start: float
    end: float
    hold: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0 and 0 <= self.hold < 1):
            raise ValueError(
                f"beta from {self.start:g} to {self.end:g}, held for {self.hold:g} of the run: "
                "both must be positive and the share in [0, 1)"
            )

    def __call__(self, share: float) -> float:
        """beta when `share` of the run is over, 0 to 1."""
        ramp = min(1.0, max(0.0, (share - self.hold) / (1 - self.hold)))
        return float(self.start * (self.end / self.start) ** ramp)


@dataclass(slots=True)
class BudgetController:
    """Steers a cost to a target: log10(beta) = p * e + i * sum(e) + d * change of e.

    e = log10(cost / target): positive above the target, so that the price rises. The cost is
    anything that falls with beta: EBOPs, bytes of codes, bytes of the packed file.

    Attributes:
        target: what the cost shall become.
        beta: in force, at first the initial one.
        p, i, d: gains.
        warmup: first steps, which leave beta alone.
        least, most: limits of beta; the sum stops growing while one of them holds.
    """

    target: float
    beta: float
    p: float = 1.0
    i: float = 2e-3
    d: float = 0.0
    warmup: int = 10
    least: float = 0.0
    most: float = math.inf
    _steps: int = field(default=0, repr=False)
    _integral: float = field(default=0.0, repr=False)
    _error: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.beta > 0):
            raise ValueError(f"target {self.target:g} and beta {self.beta:g} must both be positive")

    def step(self, cost: float) -> float:
        """Take the cost after an epoch, give the beta of the next."""
        self._steps += 1
        if self._steps <= self.warmup:
            return self.beta
        error = math.log10(max(cost, 1e-9) / self.target)
        if self._steps == self.warmup + 1 and self.i:
            # The first beta goes on without a jump.
            self._integral = (math.log10(self.beta) - self.p * error) / self.i - error
            self._error = error
        integral = self._integral + error
        exponent = self.p * error + self.i * integral + self.d * (error - self._error)
        wanted = 10.0**exponent
        self.beta = min(max(wanted, self.least), self.most)
        if self.beta == wanted:
            self._integral = integral
        self._error = error
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {
            "beta": self.beta,
            "steps": self._steps,
            "integral": self._integral,
            "error": self._error,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.beta, self._steps = state["beta"], int(state["steps"])
        self._integral, self._error = state["integral"], state["error"]
