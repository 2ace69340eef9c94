"""What trials weigh once their codes are entropy-coded, and what the freed bytes buy.

The length of a coded file depends on the codes, so the search plans with plain sizes, which are
upper bounds. Afterwards it goes on with coded ones: that is where freed bytes are spent.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant_ops.bit_widths import code_bytes
from quant_ops.candidate import Candidate, LayerQuant
from quant_ops.coded import layer_codes
from quant_ops.dual import without_unused
from quant_ops.graph import Layer
from quant_ops.packed import PackedModel
from quant_ops.packed_size import header, payload_bytes
from quant_ops.quantized import QuantizedModel
from quant_ops.storage import kept_weights, plan_storage, width_counts
from search.context import Limits, RunContext
from search.evaluation import CODED, Evaluation, within
from search.finish import packed_path
from search.front import FrontInfo, ParetoFront
from search.prepare import Prepared
from search.record import Record
from search.recovery import RECOVERY
from search.strategies.auto import Memory, Share
from search.strategies.table import make_strategy
from search.strategy import SearchOver

SIZE = "size_bytes"
SHARE = 5  # one trial in so many is proposed for its coded size
POINTS = 8  # sizes between the smallest and the largest, besides those asked for


class Coder:
    """Lengths of coded files, each layer coded once per set of widths.

    Args:
        prepared: the task.
        folder: of the run; holds the files of recovered trials.
    """

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self._prepared = prepared
        self._folder = folder
        self._graph = prepared.traced.graph
        self._saved: dict[tuple[str, LayerQuant, LayerQuant | None, bytes], int] = {}
        self._lengths: dict[int, int] = {}

    def candidate_bytes(self, candidate: Candidate) -> int:
        """Length of the coded file of a candidate with its plain weights."""
        n_payload = payload_bytes(self._graph, candidate)
        other = self._prepared.evaluator.bank.partners(candidate)
        graph, stored = without_unused(self._graph, candidate)
        storage = plan_storage(graph, stored)
        for layer, quant in zip(graph.layers, storage.quants, strict=True):
            if quant is not None:
                columns = storage.columns.get(layer.name)
                n_payload -= self._saved_bytes(layer, quant, other.get(layer.name), columns)
        return len(header(n_payload)) + n_payload

    def model(self, evaluation: Evaluation) -> QuantizedModel:
        """What a recorded trial's file holds."""
        if not evaluation.recipe:
            return self._prepared.evaluator.bank.quantize(evaluation.candidate)
        return PackedModel.load(packed_path(self._folder, evaluation.trial)).model

    def packed(self, evaluation: Evaluation) -> PackedModel:
        """The coded file of a recorded trial."""
        return PackedModel.from_model(self.model(evaluation), CODED)

    def as_coded(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with the length of its coded file for its size."""
        if not evaluation.recipe:
            n_bytes = self.candidate_bytes(evaluation.candidate)
        elif evaluation.coded:
            return evaluation
        else:
            if evaluation.trial not in self._lengths:
                self._lengths[evaluation.trial] = self.packed(evaluation).size_bytes
            n_bytes = self._lengths[evaluation.trial]
        return replace(evaluation, costs={**evaluation.costs, SIZE: float(n_bytes)})

    def _saved_bytes(
        self,
        layer: Layer,
        quant: LayerQuant,
        other: LayerQuant | None,
        columns: NDArray[np.intp] | None,
    ) -> int:
        key = (layer.name, quant, other, b"" if columns is None else columns.tobytes())
        if key not in self._saved:
            # codes do not depend on which inputs are removed, only the bias does
            quantized = self._prepared.evaluator.bank.layer(layer.name, quant, other=other)
            coded = layer_codes(layer, quant, quantized, columns, CODED)
            kept = kept_weights(layer, columns)
            counts = width_counts(layer, quant)
            plain = sum(code_bytes(width, n * kept) for width, n in counts.items())
            self._saved[key] = plain - coded.size_bytes
        return self._saved[key]


class CodedShare(Share):
    """A Context in which every size is that of the coded file."""

    def __init__(
        self,
        context: RunContext,
        memory: Memory,
        coder: Coder,
        strategy: str,
        batches: int | None = None,
    ) -> None:
        super().__init__(context, memory, context.seed, strategy, batches)
        self._coder = coder

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        evaluations = super().evaluate(candidates)
        coded = [self._coder.as_coded(evaluation) for evaluation in evaluations]
        self._memory.results.update({evaluation.candidate: evaluation for evaluation in coded})
        return coded

    def size_of(self, candidate: Candidate) -> int:
        return self._coder.candidate_bytes(candidate)

    def cost_of(self, candidate: Candidate) -> dict[str, float]:
        return {**super().cost_of(candidate), SIZE: float(self.size_of(candidate))}


def spend(context: RunContext, coder: Coder, limits: Limits) -> None:
    """Search on among candidates whose coded files fit: plain ones may be too large.

    The integer program with the coded bytes of every layer and width, then local search in the
    gaps of the front of coded sizes.
    """
    if limits.trials is not None and limits.trials < 1:
        return
    # early stopping compares plain sizes
    context.begin("rate-distortion", limits, in_full=True)
    memory = Memory()
    for evaluation in context.history():
        memory.results[evaluation.candidate] = coder.as_coded(evaluation)
    with suppress(SearchOver):
        program = make_strategy("rate-distortion", {"points": POINTS})
        program.run(CodedShare(context, memory, coder, "rate-distortion"))
        make_strategy("local-search").run(CodedShare(context, memory, coder, "local-search"))


def code_front(
    prepared: Prepared, context: RunContext, record: Record, info: FrontInfo, coder: Coder
) -> list[Evaluation]:
    """A coded file, as a trial of its own, for every trial that is on the front with one.

    The baselines inside the budgets get theirs too. A trial that gains nothing stays as it is.
    """
    evaluations = [e for e in record.evaluations() if prepared.space.contains(e.candidate)]
    by_trial = {e.trial: e for e in evaluations}
    done = {e.parent for e in evaluations if e.coded}
    front = ParetoFront.of([coder.as_coded(e) for e in evaluations], info)
    baselines = [e for e in front.baselines if within(info.budgets.limits, e.costs)]
    wanted = {e.trial: e for e in (*front.points, *baselines) if not e.coded}
    steps = record.facts(RECOVERY)
    out = []
    for trial, seen in wanted.items():
        if trial in done or seen.size_bytes == by_trial[trial].size_bytes:
            continue
        out.append(context.submit_coded(by_trial[trial], coder.packed(by_trial[trial])))
        if trial in steps:
            record.add_fact(out[-1].trial, RECOVERY, steps[trial])
    return out
