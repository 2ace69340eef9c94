import os

import pytest
import torch

from quant_ops.errors import EnvironmentFault, UsageError
from search.tasks.cifar10 import load_checkpoint, shift_and_flip
from search.tasks.models import CifarResNet
from search.tasks.table import load_task
from search.tasks.training import accuracy

needs_data = pytest.mark.skipif(
    "BITFRONT_DATA" not in os.environ,
    reason="BITFRONT_DATA does not name a folder with CIFAR-10, Fashion-MNIST and checkpoints",
)


@pytest.mark.parametrize(("depth", "n_parameters"), [(20, 269_722), (56, 853_018)])
def test_networks_have_the_published_sizes(depth, n_parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == n_parameters


def test_checkpoint_with_the_prefix_of_parallel_training_loads(tmp_path):
    saved, loaded = CifarResNet(20), CifarResNet(20)
    state = {f"module.{k}": v for k, v in saved.state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "a.th")
    load_checkpoint(loaded, tmp_path / "a.th")
    assert torch.equal(saved.linear.weight, loaded.linear.weight)


def test_checkpoint_of_another_depth_is_refused_with_the_first_key(tmp_path):
    torch.save(CifarResNet(20).state_dict(), tmp_path / "a.th")
    with pytest.raises(UsageError, match=r"'layer1\.3\.conv1\.weight' of shape .* is missing"):
        load_checkpoint(CifarResNet(56), tmp_path / "a.th")
    torch.save(CifarResNet(56).state_dict(), tmp_path / "a.th")
    with pytest.raises(UsageError, match=r"also holds 'layer1\.3\.conv1\.weight'"):
        load_checkpoint(CifarResNet(20), tmp_path / "a.th")


def test_checkpoint_of_another_width_is_refused_with_both_shapes(tmp_path):
    torch.save(CifarResNet(20, n_classes=100).state_dict(), tmp_path / "a.th")
    with pytest.raises(UsageError, match=r"must have shape \(10, 64\), but has \(100, 64\)"):
        load_checkpoint(CifarResNet(20), tmp_path / "a.th")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.th").write_bytes(content)
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        load_checkpoint(CifarResNet(20), tmp_path / "a.th")


@pytest.mark.parametrize("name", ["cifar10-resnet20", "cifar10-resnet56", "fashion-mnist"])
def test_missing_data_are_named_with_their_source(tmp_path, monkeypatch, name):
    monkeypatch.delenv("BITFRONT_DATA", raising=False)
    with pytest.raises(EnvironmentFault, match="--data DATA or BITFRONT_DATA"):
        load_task(name)
    with pytest.raises(EnvironmentFault, match="does not exist"):
        load_task(name, data=tmp_path / "nowhere")
    with pytest.raises(EnvironmentFault, match=r"get .* from github\.com"):
        load_task(name, data=tmp_path)


def test_shifted_images_keep_their_shape_and_their_pixels():
    images = torch.rand(16, 3, 32, 32) + 1
    moved = shift_and_flip(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    known = torch.cat([images.flatten(), torch.zeros(1)])
    assert torch.isin(moved, known).all()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_checkpoints_reach_their_published_accuracy(name, expected):
    task = load_task(f"cifar10-{name}")
    assert accuracy(task.model, task.test()) == pytest.approx(expected, abs=1e-4)
    assert [sum(len(y) for _, y in b) for b in (task.calibration, task.validation)] == [1024, 5000]


@needs_data
@pytest.mark.slow
def test_fashion_mnist_is_learnt(monkeypatch, tmp_path):
    task = load_task("fashion-mnist")
    assert accuracy(task.model, task.validation) > 0.91
