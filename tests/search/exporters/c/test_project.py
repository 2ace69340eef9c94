"""The generated folder: warnings, sanitizers, memory, cross compilation, refusals, the command."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c_networks import write_project
from small_networks import C, Net, random_packed
from torch import Tensor, nn

from quant_ops.errors import UsageError, VerificationError
from search.exporters.c.compiler import compile_c, load_library, sections
from search.exporters.c.exporter import CExporter
from search.exporters.c.memory import lay_out
from search.exporters.c.moves import HOLE, loops
from search.exporters.c.project import generate
from search.exporters.c.reduced import reduced_program
from search.exporters.c.translate import translate
from search.tasks.models import CifarResNet

SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
BARE_METAL = ("-mcpu=cortex-m4", "-mthumb", "-Os", "-std=c99", "-Wall", "-Wextra", "-Wpedantic")


class Small(nn.Module):
    """Residual sums, a strided shortcut, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.second(x) + x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.third(x) + short).mean((2, 3)))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c") / "small"
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    write_project(random_packed(Small(), (x,), 0), (x,), folder)
    return folder


def make(folder: Path, *arguments: str, level: int = 9) -> str:
    done = subprocess.run(
        ["make", "-B", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "BITFRONT_LEVEL": str(level)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.compiled
def test_vectors_are_equal_under_the_sanitizers(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    for level in (0, 1, 2):
        said = make(tmp_path, "check", f"CFLAGS={SANITIZERS}", level=level)
        assert "8 samples, 0 output integers differ" in said


@pytest.mark.compiled
def test_a_wrong_output_is_noticed(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / "vectors.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "vectors.bin").write_bytes(content)
    done = subprocess.run(
        ["make", "check", "CFLAGS=-O0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "1 output integers differ" in done.stdout


@pytest.mark.compiled
@pytest.mark.parametrize("options", [("-Os", "-DBITFRONT_PORTABLE"), ("-O2",)])
def test_static_memory_is_what_was_predicted(
    project: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    facts = json.loads((project / "library.json").read_text())
    compile_c([project / "network.c"], tmp_path / "network.o", ("-c", *options))
    found = sections(tmp_path / "network.o")
    if found is None:
        pytest.skip("size (binutils) is not installed")
    portable = "-DBITFRONT_PORTABLE" in options
    assert found.ram == facts["ram_bytes" if portable else "x86_ram_bytes"]
    assert found.constants <= 1.03 * facts["constant_bytes"] + 512


@pytest.mark.compiled
def test_clang_has_no_complaint(project: Path, tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    assert "0 output integers differ" in make(tmp_path, "check", "CC=clang")


def test_a_cortex_m_takes_it(project: Path, tmp_path: Path) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("gcc-arm-none-eabi is not installed")
    obj, probe = tmp_path / "network.o", tmp_path / "probe.c"
    probe.write_text("#include <string.h>\n")
    tried = ["arm-none-eabi-gcc", "-c", str(probe), "-o", str(obj)]
    if subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("libnewlib-arm-none-eabi (string.h) is not installed")
    command = ["arm-none-eabi-gcc", *BARE_METAL, "-Werror", "-c", str(project / "network.c")]
    subprocess.run([*command, "-o", str(obj)], check=True)
    found = sections(obj, "arm-none-eabi-size")
    facts = json.loads((project / "library.json").read_text())
    assert found is not None
    assert found.ram == facts["ram_bytes"]


@pytest.mark.compiled
def test_nothing_of_libc_but_memcpy_is_called(project: Path, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    options = ("-c", "-Os", "-DBITFRONT_PORTABLE", "-ffreestanding")
    compile_c([project / "network.c"], tmp_path / "n.o", options)
    done = subprocess.run(
        ["nm", "-u", str(tmp_path / "n.o")], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in done.stdout.splitlines()} <= {"memcpy"}


class Wide(nn.Module):
    """Two wide values, each reduced at once if the library may choose when."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.ModuleList(nn.Conv2d(2, 32, 1) for _ in range(2))
        self.reduce = nn.ModuleList(nn.Conv2d(32, 2, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        one, two = (F.relu(widen(x)) for widen in self.widen)
        return self.reduce[0](one) + self.reduce[1](two)


@pytest.mark.compiled
def test_operations_run_in_the_order_that_needs_least_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8, 8)
    packed = random_packed(Wide(), (x,), 0)
    given = translate(reduced_program(packed.model))
    write_project(packed, (x,), tmp_path)
    facts = json.loads((tmp_path / "library.json").read_text())
    assert facts["ram_bytes"] < 0.75 * lay_out(given).n_bytes
    said = make(tmp_path, "check", "CFLAGS=-O1 -DBITFRONT_PORTABLE", level=0)
    assert "4 samples, 0 output integers differ" in said
    compile_c([tmp_path / "network.c"], tmp_path / "n.o", ("-c", "-Os", "-DBITFRONT_PORTABLE"))
    found = sections(tmp_path / "n.o")
    assert found is None or found.ram == facts["ram_bytes"]


@pytest.mark.compiled
@pytest.mark.slow
def test_resnet20_is_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    packed = random_packed(CifarResNet(20), (x,), 0, deep=True)
    write_project(packed, (x,), tmp_path)
    assert "4 samples, 0 output integers differ" in make(tmp_path, "check", "CFLAGS=-O2")


def test_sorting_is_refused_by_name() -> None:
    net = Net(lambda m, x: m.a(x).topk(2, 1)[0], a=C(2, 3, 1))
    (refusal,) = CExporter().refusals(random_packed(net, (torch.ones(3, 2, 4, 4),), 0))
    assert "sorts values (topk.default)" in refusal.reason


def test_a_float_operator_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    packed = random_packed(net, (x,), 0)
    (refusal,) = CExporter().refusals(packed)
    assert "gelu" in refusal.reason
    with pytest.raises(UsageError, match="the C target cannot express"):
        generate(packed)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"name": "x; rm", "inputs": [], "outputs": []}',
     '{"name": "network", "inputs": [[-1]], "outputs": []}',
     '{"name": "network", "inputs": [[99999999, 99999999]], "outputs": []}'],
)  # fmt: skip
def test_a_damaged_description_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "library.json").write_text(text)
    with pytest.raises(VerificationError, match="does not describe"):
        load_library(tmp_path)


@pytest.mark.compiled
def test_damaged_source_is_refused(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    (tmp_path / "network.c").write_text("int main(void) { return 0; ")
    with pytest.raises(VerificationError, match="does not compile"):
        load_library(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_loops_add_up_to_the_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 3)
    source = np.arange(sizes.prod()).reshape(sizes).transpose(rng.permutation(3))
    positions = np.pad(source[:, :: int(rng.integers(1, 3))], [(0, 1), (0, 0), (2, 0)],
                       constant_values=HOLE).reshape(-1)  # fmt: skip
    start, axes = loops(positions)
    found = np.array([start])
    holes = np.array([False])
    for axis in axes:
        table = axis.table or tuple(i * axis.stride for i in range(axis.count))
        steps = np.array([0 if t is None else t for t in table])
        found = (found[:, None] + steps).reshape(-1)
        holes = (holes[:, None] | np.array([t is None for t in table])).reshape(-1)
    np.testing.assert_array_equal(np.where(holes, HOLE, found), positions)
