"""A made-up front whose losses follow 4^-bits, as large as a small ResNet's."""

from collections.abc import Callable

import numpy as np
import pytest

from quant_ops.candidate import Candidate
from search.budget import Budgets
from search.dominance import HypervolumeScale
from search.evaluation import Evaluation
from search.front import FrontInfo, ParetoFront

MadeUp = tuple[list[Evaluation], ParetoFront]


@pytest.fixture
def make_front() -> Callable[..., MadeUp]:
    def make(n_layers: int = 21, n_random: int = 40, seed: int = 0, **info: object) -> MadeUp:
        generator = np.random.default_rng(seed)
        names = [f"layer{i // 8}.{i}.conv" for i in range(n_layers - 1)] + ["fc"]
        evaluations: list[Evaluation] = []

        def add(widths: list[float], strategy: str) -> None:
            loss = float(np.mean(4.0 ** -np.array(widths))) * 8
            costs = {"size_bytes": float(300 * sum(widths) + 900), "bops": 1e6 * sum(widths)}
            candidate = Candidate.of(dict(zip(names, widths, strict=True)), {"relu": 8})
            evaluations.append(
                Evaluation(
                    candidate, loss, max(0.1, 0.92 - loss / 10), costs, loss / 30, 1 - loss / 10,
                    0.5, strategy, seed, trial=len(evaluations),
                    notes={"mean_weight_bits": float(np.mean(widths))},
                )
            )  # fmt: skip

        for width in (2, 3, 4, 5, 6, 7, 8):
            add([float(width)] * n_layers, "uniform")
        for high in range(2, 9):
            add([high - 0.0 if i % 2 else 4.0 for i in range(n_layers)], "rate-distortion")
        for _ in range(n_random):
            middle = generator.integers(1, 7)
            legal = np.array([0, 1, 1.6, 2, 3, 4, 5, 6, 7, 8])[middle : middle + 4]
            add([float(generator.choice(legal)) for _ in names], "nsga2")
        largest = 300 * 8 * n_layers + 900
        fields = {
            "task": "toy", "metric": "top-1", "higher_is_better": True, "percent": True,
            "n_validation": 1000, "float_validation": 0.92, "float_size_bytes": 4 * largest,
            "scale": HypervolumeScale(900, largest, 8.0),
            "budgets": Budgets.parse([f"{largest * 3 // 4}", f"{largest // 2}"]),
        } | info  # fmt: skip
        return evaluations, ParetoFront.of(evaluations, FrontInfo(**fields), seconds=12.0)  # type: ignore[arg-type]

    return make
