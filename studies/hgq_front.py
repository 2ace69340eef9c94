"""HGQ here against HGQ2 0.2.0: one MLP, the same start, recipe and time, fronts side by side.

    python studies/hgq_front.py [--seconds 60] [--seeds 5] [--sides bitfront,hgq2-jax,hgq2-torch]
                          [--clock wall|cpu] [--compile]
    python studies/hgq_front.py --table [--test]

MLP 64-64-32-32-10 on scikit-learn's digits (897 images to train, 300 to validate). beta rises
log-linearly with the share of the time that is over; four times a second the weights and widths
are kept. Afterwards one referee judges every kept state of either side: ranges traced on the
training images, EBOPs, validation error in inference mode. Sides take turns, each in a process of
its own with one thread; the clock starts after the first epoch, so that compilation is not part of
it (its seconds are given). Rows go to studies/rows/hgq.jsonl; what is there is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from row_file import RowFile

SIDES = ("bitfront", "hgq2-jax", "hgq2-torch")
SEEDS = range(5)
SIZES = (64, 64, 32, 32, 10)
BATCH, LEARNING_RATE = 299, 3e-3  # three batches an epoch, none smaller
BETA, GAMMA = (1e-7, 1e-4), 1e-8
INITIAL = {"integer": 2, "fraction": 6}
KEPT_PER_SECOND = 4
EBOPS_SCALE = (2.0**8, 2.0**19)  # x axis of the hypervolume, log2; y is the error up to chance
WORST_ERROR = 0.9
HERE = Path(__file__).parent
ROWS, KEPT = RowFile("hgq"), Path("runs/hgq")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
State = dict[str, Any]  # "0.weight" and so on to an array


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments.run[0], int(arguments.run[1]), arguments)
    elif arguments.table:
        print_table(read_test=arguments.test)
    else:
        for seed in range(arguments.seeds):
            for side in arguments.sides.split(","):
                measure(side, seed, arguments)


def measure(side: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run in a process of its own, judged; nothing where its row exists."""
    compiled = arguments.compile and side == "bitfront"
    asked = {
        "side": side, "seed": seed, "seconds": arguments.seconds, "clock": arguments.clock,
        "compiled": compiled,
    }  # fmt: skip
    if any(asked.items() <= row.items() for row in ROWS):
        return
    path = kept_path(asked)
    command = [sys.executable, __file__, "--run", side, str(seed)]
    command += ["--seconds", str(arguments.seconds), "--clock", arguments.clock]
    backend = {"KERAS_BACKEND": side.removeprefix("hgq2-")} if side != "bitfront" else {}
    subprocess.run(
        [*command, *(["--compile"] if compiled else [])],
        check=True,
        env={**os.environ, **ONE_THREAD, **backend},
    )
    points = judge(path)
    front = non_dominated(points)
    row = {
        **asked,
        **json.loads(path.with_suffix(".json").read_text()),
        "kept": len(points),
        "hypervolume": hypervolume(front),
        "front": [[round(e), round(err, 6), i] for e, err, i in front],
        "date": str(date.today()),
    }
    ROWS.append(row)
    print({key: value for key, value in row.items() if key != "front"}, flush=True)


def kept_path(row: dict[str, Any]) -> Path:
    """Where the states of a run lie."""
    KEPT.mkdir(parents=True, exist_ok=True)
    name = f"{row['side']}-{row['seed']}-{row['seconds']:g}-{row['clock']}"
    return KEPT / f"{name}{'-compiled' if row['compiled'] else ''}.npz"


def initial_weights(seed: int) -> list[Any]:
    """Glorot uniform (out, in) for every layer: the same start for all sides."""
    import numpy as np

    generator = np.random.default_rng(seed)
    out = []
    for n_in, n_out in pairwise(SIZES):
        limit = (6 / (n_in + n_out)) ** 0.5
        out.append(generator.uniform(-limit, limit, (n_out, n_in)).astype("float32"))
    return out


class Keeper:
    """The clock of a run: says what share of the time is over, and keeps states on the way."""

    def __init__(self, seconds: float, clock: str, state_of: Callable[[], State]) -> None:
        self._now = time.process_time if clock == "cpu" else time.monotonic
        self._seconds, self._state_of = seconds, state_of
        self._born = self._now()
        self.warmup = 0.0
        self._start: float | None = None
        self.states: list[State] = []
        self.steps = 0

    @property
    def share(self) -> float:
        """Of the time that is over; 0 until the first epoch has ended."""
        return 0.0 if self._start is None else (self._now() - self._start) / self._seconds

    @property
    def beta(self) -> float:
        """In force."""
        return BETA[0] * (BETA[1] / BETA[0]) ** min(1.0, self.share)

    def end_epoch(self, steps: int) -> bool:
        """Count, keep, and say whether the time is over."""
        if self._start is None:
            self._start = self._now()
            self.warmup = self._start - self._born
            return False
        self.steps += steps
        if self.share * self._seconds * KEPT_PER_SECOND >= len(self.states):
            self.states.append(self._state_of())
        return self.share >= 1

    def save(self, path: Path) -> None:
        """Every state, and the time per step."""
        import numpy as np

        taken = self.share * self._seconds
        arrays = {f"{i}/{k}": v for i, s in enumerate(self.states) for k, v in s.items()}
        np.savez(path, **arrays)
        facts = {
            "steps": self.steps,
            "ms_per_step": round(1e3 * taken / self.steps, 4),
            "warmup_s": round(self.warmup, 2),
        }
        path.with_suffix(".json").write_text(json.dumps(facts))


def train(side: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train one side for the time given and keep its states."""
    asked = {**vars(arguments), "side": side, "seed": seed, "compiled": arguments.compile}
    train_side = train_bitfront if side == "bitfront" else train_hgq2
    train_side(seed, arguments).save(kept_path(asked))


def model_of_bitfront() -> Any:
    """The MLP, with the widths that HGQ2 begins with."""
    from torch import nn

    from quant_ops.hgq import Arithmetic, HGQLinear, QuantizerSpec
    from quant_ops.hgq.layers import LayerSpecs

    specs = LayerSpecs(
        bias=QuantizerSpec(
            "kbi", True, INITIAL["integer"], INITIAL["fraction"], Arithmetic("RND", "SAT_SYM")
        )
    )
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(SIZES):
        modules += [HGQLinear(n_in, n_out, specs=specs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def images_of(split: int) -> tuple[Any, Any]:
    """Flattened images (n, 64) and labels of the training (0), validation (1) or test (2) split."""
    from search.tasks.digits import splits

    images, labels = splits()[split]
    return images.flatten(1).contiguous(), labels


def train_bitfront(seed: int, arguments: argparse.Namespace) -> Keeper:
    """Eager, or compiled; Adam as in keras."""
    import torch
    from torch import nn

    from quant_ops.hgq import FusedTraining, penalty

    torch.set_num_threads(1)
    images, labels = images_of(0)
    model = model_of_bitfront()
    layers = list(model)[::2]
    with torch.no_grad():
        for layer, weight in zip(layers, initial_weights(seed), strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.zero_()
    criterion = nn.CrossEntropyLoss()

    if arguments.compile:

        @torch.compile
        def loss_of(x: Any, y: Any, beta: Any) -> Any:
            return criterion(model(x), y) + penalty(model, beta=beta, gamma=GAMMA)

        parameters = model.parameters()
    else:
        fused = FusedTraining(model)

        def loss_of(x: Any, y: Any, beta: Any) -> Any:
            return criterion(fused(x), y) + fused.penalty(beta=beta, gamma=GAMMA)

        parameters = fused.parameters()
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, eps=1e-7, fused=True)
    keeper = Keeper(
        arguments.seconds,
        arguments.clock,
        lambda: {k: v.detach().clone().numpy() for k, v in model.state_dict().items()},
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    done = False
    while not done:
        beta, steps = torch.tensor(keeper.beta), 0
        order = torch.randperm(len(images), generator=generator)
        for picked in order.split(BATCH):
            optimizer.zero_grad()
            loss_of(images[picked], labels[picked], beta).backward()
            optimizer.step()
            steps += 1
        done = keeper.end_epoch(steps)
    return keeper


def train_hgq2(seed: int, arguments: argparse.Namespace) -> Keeper:
    """HGQ2's own layers under model.fit on the backend that KERAS_BACKEND names."""
    warnings.simplefilter("ignore")
    import keras
    import torch
    from hgq.config import QuantizerConfig
    from hgq.layers import QDense

    torch.set_num_threads(1)
    keras.utils.set_random_seed(seed)
    images, labels = (split.numpy() for split in images_of(0))
    first = {"i0": INITIAL["integer"]}
    total = {"b0": INITIAL["integer"] + INITIAL["fraction"], **first}
    layers = [
        QDense(
            n_out,
            activation="relu" if i + 2 < len(SIZES) else None,
            beta0=BETA[0],
            kq_conf=QuantizerConfig("kbi", "weight", **total),
            bq_conf=QuantizerConfig("kbi", "bias", overflow_mode="SAT_SYM", **total),
            iq_conf=QuantizerConfig("kif", "datalane", f0=INITIAL["fraction"], **first),
        )
        for i, n_out in enumerate(SIZES[1:])
    ]
    model = keras.Sequential([keras.Input((SIZES[0],)), *layers])
    for layer, weight in zip(layers, initial_weights(seed), strict=True):
        layer._kernel.assign(weight.T)
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    keeper = Keeper(arguments.seconds, arguments.clock, lambda: state_of_hgq2(layers))
    steps = -(-len(images) // BATCH)

    class Steering(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            for layer in layers:
                layer._beta.assign(keeper.beta)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if keeper.end_epoch(steps):
                self.model.stop_training = True

    model.fit(
        images, labels, batch_size=BATCH, epochs=10**9, verbose=0, callbacks=[Steering()]
    )  # fmt: skip
    return keeper


def state_of_hgq2(layers: list[Any]) -> State:
    """The same names and layouts as the state_dict of `model_of_bitfront`."""
    import numpy as np
    from keras import ops

    def array(variable: Any) -> Any:
        return np.array(ops.convert_to_numpy(variable), "float32")

    state: State = {}
    for i, layer in enumerate(layers):
        name = str(2 * i)
        state[f"{name}.weight"] = array(layer._kernel).T
        state[f"{name}.bias"] = array(layer.bias)
        for kind, quantizer in (("weight", layer.kq), ("bias", layer.bq), ("input", layer.iq)):
            inner, into = quantizer.quantizer, f"{name}.{kind}_quantizer"
            second = "fraction_bits" if kind == "input" else "total_bits"
            values = (inner._k, inner._i, inner._f if kind == "input" else inner._b)
            for key, value in zip(("signed", "integer_bits", second), values, strict=True):
                state[f"{into}.{key}"] = array(value).T if kind == "weight" else array(value)
    return state


def judge(path: Path, split: int = 1, only: set[int] | None = None) -> list[Any]:
    """(EBOPs, error, number) of the kept states: the one referee of all sides."""
    import numpy as np
    import torch

    from quant_ops.hgq import trace_ranges

    model = model_of_bitfront().eval()
    training, _ = images_of(0)
    images, labels = images_of(split)
    points = []
    with np.load(path) as arrays, torch.no_grad():
        states: dict[int, dict[str, Any]] = {}
        for key in arrays.files:
            number, _, name = key.partition("/")
            if only is None or int(number) in only:
                states.setdefault(int(number), {})[name] = torch.from_numpy(arrays[key].copy())
        for number, state in states.items():
            model.load_state_dict(state)
            cost = trace_ranges(model, [training])
            wrong = (model(images).argmax(1) != labels).double().mean()
            points.append((cost, float(wrong), number))
    return points


def non_dominated(points: list[Any]) -> list[Any]:
    """Ascending EBOPs, falling errors."""
    front: list[Any] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def hypervolume(front: list[Any]) -> float:
    """Of (log2 EBOPs, error), each scaled to [0, 1]; reference point (1, 1)."""
    import math

    low, high = map(math.log2, EBOPS_SCALE)
    area, ceiling = 0.0, 1.0
    for cost, error, _ in front:
        x = max(0.0, (math.log2(max(cost, 1.0)) - low) / (high - low))
        y = error / WORST_ERROR
        if x < 1 and y < ceiling:
            area += (1 - x) * (ceiling - y)
            ceiling = y
    return round(area, 6)


def print_table(*, read_test: bool) -> None:
    """One line per run; the test split only where asked, of the frozen front."""
    print("| side | seed | seconds | ms/step | start s | hypervolume | error at 32k, 64k EBOPs |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        at = [  # the best that costs no more
            min((e for c, e, _ in row["front"] if c <= limit), default=None)
            for limit in (32_000, 64_000)
        ]
        errors = ", ".join("-" if e is None else f"{100 * e:.2f} %" for e in at)
        side = row["side"] + (" compiled" if row["compiled"] else "")
        print(
            f"| {side} | {row['seed']} | {row['seconds']:g} {row['clock']} "
            f"| {row['ms_per_step']:.2f} | {row['warmup_s']} "
            f"| {row['hypervolume']:.4f} | {errors} |"
        )
        if read_test:
            points = judge(kept_path(row), split=2, only={i for _, _, i in row["front"]})
            print(f"  test hypervolume {hypervolume(non_dominated(points)):.4f}")
    print_means(list(ROWS))
    if read_test:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
        with (HERE / "TEST_READS.md").open("a") as file:
            file.write(
                f"| {date.today()} | {commit} | digits | frozen fronts of every row of "
                "`studies/rows/hgq.jsonl` | `studies/hgq_front.py --table --test` |\n"
            )


def print_means(measured: list[dict[str, Any]]) -> None:
    """Of each peer and bitfront, over the seeds that both have, with the difference's interval."""
    import statistics

    from gradient import interval

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["seed"], row["seconds"], row["clock"]

    ours = {key(row): row for row in measured if row["side"] == "bitfront" and not row["compiled"]}
    for side in SIDES[1:]:
        pairs = [(ours[key(r)], r) for r in measured if r["side"] == side and key(r) in ours]
        if not pairs:
            continue
        gaps = [mine["hypervolume"] - theirs["hypervolume"] for mine, theirs in pairs]
        ratio = statistics.median(m["ms_per_step"] / t["ms_per_step"] for m, t in pairs)
        mean, half = statistics.fmean(gaps), interval(gaps)
        print(
            f"bitfront over {side}: hypervolume {mean:+.4f} ± {half:.4f}, ahead "
            f"in {sum(g > 0 for g in gaps)} of {len(gaps)}; time per step x {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
