"""Makes the shipped T4 tables from what HAWQ-V3 [Yao2021] published.

    python studies/t4_tables.py --inputs hawq_v3_ilp_inputs.json

`--inputs` holds the arrays of the notebook ILP.ipynb of github.com/Zhen-Dong/HAWQ (commit 1616df6,
MIT licence): "resnet18" and "resnet50" with "latency_int4" and "latency_int8" in execution order.
"""

import argparse
import json
from pathlib import Path

from cost_models.latency.table import Entry, LatencyTable, Rule
from cost_models.latency.work import Work

TABLES = Path(__file__).parent.parent / "cost_models" / "tables"
DEVICE = {"name": "NVIDIA T4", "fingerprint": "nvidia-t4"}
RULES = (
    Rule("int4", ("conv", "linear"), 4, 4, "narrower weights and inputs are widened"),
    Rule("int8", ("conv", "linear"), 8, 8, "wherever weights or inputs have more than 4 bits"),
)
# microseconds of the best kernel: in, out, kernel, stride, input size, INT4, INT8
TUNED = (
    (64, 64, 3, 1, 56, 62.44, 118.81),
    (64, 128, 3, 2, 56, 33.68, 70.49),
    (128, 128, 3, 1, 28, 63.55, 146.01),
    (128, 256, 3, 2, 28, 33.59, 65.20),
    (256, 256, 3, 1, 14, 76.26, 125.34),
    (256, 512, 3, 2, 14, 45.50, 75.52),
    (512, 512, 3, 1, 7, 83.13, 145.68),
    (64, 128, 1, 2, 56, 9.01, 13.81),
    (128, 256, 1, 2, 28, 6.37, 10.78),
    (256, 512, 1, 2, 14, 6.41, 11.13),
    (3, 64, 7, 2, 224, None, 376.92),
)
LINEAR = (512, 1000, None, 4.38)


def conv(n_in: int, n_out: int, kernel: int, stride: int, size: int) -> Work:
    """A convolution with the padding that keeps the size, as residual networks have them."""
    pad = kernel // 2
    attributes = ((kernel,) * 2, (stride,) * 2, (pad,) * 4, (1, 1), (1,), (0,))
    return Work("conv", (n_in, n_out, size, size), attributes)


def resnet18_layers() -> list[tuple[str, Work]]:
    """All but the first convolution and the classifier, named as torchvision does."""
    layers = []
    n_in, size = 64, 56
    for stage, n_out in enumerate((64, 128, 256, 512), 1):
        stride = 1 if stage == 1 else 2
        name = f"layer{stage}"
        layers.append((f"{name}.0.conv1", conv(n_in, n_out, 3, stride, size)))
        before, size = size, size // stride
        layers.append((f"{name}.0.conv2", conv(n_out, n_out, 3, 1, size)))
        if stride == 2:
            layers.append((f"{name}.0.downsample.0", conv(n_in, n_out, 1, 2, before)))
        layers += [(f"{name}.1.conv{i}", conv(n_out, n_out, 3, 1, size)) for i in (1, 2)]
        n_in = n_out
    return layers


def resnet50_layers() -> list[tuple[str, Work]]:
    """Likewise; the first convolution of a stage has the stride."""
    layers = []
    n_in, size = 64, 56
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}"
            before, size = size, size // stride
            layers.append((f"{name}.conv1", conv(n_in, width, 1, stride, before)))
            layers.append((f"{name}.conv2", conv(width, width, 3, 1, size)))
            layers.append((f"{name}.conv3", conv(width, 4 * width, 1, 1, size)))
            if block == 0:
                layers.append((f"{name}.downsample.0", conv(n_in, 4 * width, 1, stride, before)))
            n_in = 4 * width
    return layers


def planner_table(
    network: str, layers: list[tuple[str, Work]], arrays: dict[str, list[float]]
) -> LatencyTable:
    """What the published integer program was given; layers of one shape differ."""
    for (name, work), wanted in zip(layers, arrays["bops"], strict=True):
        height, width = work.out_size
        macs = work.n_weights * height * width / 1e6
        assert abs(macs / wanted - 1) < 1e-3, (network, name, macs, wanted)
    return LatencyTable(
        name=f"t4-hawq-v3-{network}",
        device=DEVICE,
        source=f"HAWQ-V3 [Yao2021], ILP.ipynb of github.com/Zhen-Dong/HAWQ 1616df6: what its "
        f"integer program takes for {network} at 224x224, first convolution and classifier left "
        f"out. No unit is given, and the INT8 values do not sum to the published time of the "
        f"network: use as ratios",
        date="2021-06-01",
        backend="tvm",
        unit="relative",
        rules=RULES,
        entries=tuple(
            Entry(work, bits, (time,), name)
            for bits in ("int4", "int8")
            for (name, work), time in zip(layers, arrays[f"latency_{bits}"], strict=True)
        ),
        libraries={"tvm": "2020 fork"},
    )


def tuned_table() -> LatencyTable:
    """The best kernels that auto-tuning found, at batch 8."""
    entries = []
    for *shape, int4, int8 in TUNED:
        work = conv(*shape)
        for kernel, time in (("int4", int4), ("int8", int8)):
            if time is not None:
                entries.append(Entry(work, kernel, (time,)))
    n_in, n_out, _, time = LINEAR
    entries.append(Entry(Work("linear", (n_in, n_out, 1)), "int8", (time,)))
    return LatencyTable(
        name="t4-tvm-batch8",
        device=DEVICE,
        source="HAWQ-V3 [Yao2021], TVM auto-tuning logs of ResNet-18 in tvm_benchmark of "
        "github.com/Zhen-Dong/HAWQ 1616df6: best kernel, one call works on 8 samples. Convolutions "
        "and the classifier alone: no additions, pools or changes of type",
        date="2021-06-01",
        backend="tvm",
        unit="us",
        batch=8,
        rules=RULES,
        entries=tuple(entries),
        libraries={"tvm": "2020 fork"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=Path, required=True)
    inputs = json.loads(parser.parse_args().inputs.read_text())
    networks = {"resnet18": resnet18_layers(), "resnet50": resnet50_layers()}
    tables = [planner_table(name, layers, inputs[name]) for name, layers in networks.items()]
    for table in (*tables, tuned_table()):
        path = TABLES / f"{table.name}.json"
        path.write_text(table.to_text())
        print(path, len(table.entries), "entries")


if __name__ == "__main__":
    main()
