"""Uniform widths: the baseline of every front."""

from quant_ops.candidate import Candidate, unique
from search.evaluation import Evaluation
from search.space import SearchSpace
from search.strategy import Context, Strategy, Traits


class Uniform(Strategy):
    """One width for all layers, each width that the space allows.

    Pinned layers keep their width and others take the nearest legal one. Activations stay at
    their widest; where they are searched too, the candidate with both at the same width is added.
    """

    name = "uniform"
    traits = Traits("every uniform width; the baseline", budget_aware=False)

    def run(self, context: Context) -> None:
        evaluate_in_batches(context, uniform_candidates(context.space))


def uniform_candidates(space: SearchSpace) -> list[Candidate]:
    """Widest first. Width 0 is left out: it removes what it can and means nothing as a baseline."""
    widths = sorted({w for choice in space.layers for w in choice.bit_widths if w > 0})
    proposals: list[Candidate] = []
    for width in reversed(widths):
        weights = space.uniform(width)
        proposals.append(weights)
        if any(len(edge.bit_widths) > 1 for edge in space.activations):
            edges = {
                edge.name: min(edge.bit_widths, key=lambda b: (abs(b - width), -b))
                for edge in space.activations
            }
            proposals.append(Candidate(weights.layers, tuple(edges.items())))
    return unique(proposals)


def evaluate_in_batches(context: Context, candidates: list[Candidate]) -> list[Evaluation]:
    """All candidates, as many at once as keep the workers busy; stops between batches."""
    evaluations: list[Evaluation] = []
    for start in range(0, len(candidates), context.batch_size):
        if context.should_stop():
            break
        evaluations += context.evaluate(candidates[start : start + context.batch_size])
    return evaluations
