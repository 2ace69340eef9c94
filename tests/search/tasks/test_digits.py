import math

import pytest
import torch
from torch import nn

from search.tasks import digits
from search.tasks.training import accuracy


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    monkeypatch.setattr(digits, "train_classifier", lambda *_, **__: None)
    return digits.make_task()


def rows(batches):
    return torch.cat([inputs[0] for inputs, _ in batches]).flatten(1)


def test_splits_are_stratified_and_of_the_stated_sizes(untrained):
    sizes, shares = [], []
    for batches in (untrained.calibration, untrained.validation, untrained.test()):
        labels = torch.cat([target for _, target in batches])
        sizes.append(len(labels))
        shares.append(labels.bincount(minlength=10) / len(labels))
        assert labels.dtype == torch.int64
    assert sizes == [897, 300, 600]
    assert torch.stack(shares).std(dim=0).max() < 0.005


def test_splits_do_not_depend_on_the_seed(untrained):
    other = digits.make_task(seed=1)
    assert torch.equal(rows(untrained.validation), rows(other.validation))
    assert not torch.equal(untrained.model.conv1.weight, other.model.conv1.weight)


def test_training_images_are_normalised(untrained):
    images = rows(untrained.calibration)
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_preprocessing_of_a_byte_image_is_that_of_the_stored_one(untrained):
    given = untrained.preprocessing
    pixel = 9.0
    expected = (pixel / 16 - digits.MEAN) / digits.STD
    assert (pixel / 255 - given.mean[0]) / given.std[0] == pytest.approx(expected)


def test_the_network_has_the_size_of_a_resnet18(untrained):
    n_bytes = sum(p.numel() * p.element_size() for p in untrained.model.parameters())
    assert n_bytes == 44_691_240
    assert sum(isinstance(m, nn.Conv2d) for m in untrained.model.modules()) == 20
    assert untrained.worst_loss == math.log(10)


def test_every_weight_takes_part_in_the_outputs(untrained):
    model = untrained.model
    model(untrained.examples()[0][:8]).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            assert parameter.grad.abs().sum(dim=(0, 1)).min() > 0, name


def test_moved_images_keep_their_black_background():
    black = torch.full((4, 1, 8, 8), -digits.MEAN / digits.STD)
    moved = digits.move_a_little(black, torch.Generator().manual_seed(0))
    assert torch.allclose(moved, black)


@pytest.mark.slow
def test_digits_are_learnt_in_one_training(monkeypatch, tmp_path):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    told = []
    task = digits.make_task(progress=lambda *step: told.append(step))
    assert accuracy(task.model, task.validation) >= 0.985
    assert told[-1][1] == told[-1][2] == len(told)
    again = digits.make_task(progress=lambda *_: pytest.fail("trained twice"))
    assert all(
        map(torch.equal, task.model.state_dict().values(), again.model.state_dict().values())
    )
