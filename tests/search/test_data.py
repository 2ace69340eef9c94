"""Splits: what travels to another process."""

import pickle

import torch

from search.data import Split, load_split


def test_a_batch_travels_without_the_rest_of_its_split() -> None:
    images = torch.randn(640, 3, 8, 8)
    labels = torch.arange(640)
    split = load_split([((images,), labels)], what="validation", batch=64)

    data = pickle.dumps(split)
    read: Split = pickle.loads(data)

    assert len(data) < 1.1 * (images.nbytes + labels.nbytes)
    assert len(pickle.dumps(split.first(64))) < 0.12 * (images.nbytes + labels.nbytes)
    assert len(read.batches) == 10
    for (inputs, target), (expected, label) in zip(read.batches, split.batches, strict=True):
        assert torch.equal(inputs[0], expected[0])
        assert torch.equal(target, label)
        assert inputs[0].is_contiguous(memory_format=torch.channels_last)
