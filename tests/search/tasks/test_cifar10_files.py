import pickle
import struct

import numpy as np
import pytest

from quant_ops.errors import EnvironmentFault
from search.tasks.cifar10_files import read_batch

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (10_000, 3072), dtype=np.uint8)
LABELS = GENERATOR.integers(0, 10, 10_000)


def old_python_pickle():
    """The batch as Python 2 wrote it: protocol 2, byte strings throughout."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    raw = IMAGES.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01M" + struct.pack("<H", 10_000) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(old_python_pickle, id="python 2"),
        pytest.param(
            lambda: pickle.dumps({b"data": IMAGES, b"labels": LABELS.tolist()}, protocol=4),
            id="python 3",
        ),
    ],
)
def test_python_batches_hold_what_was_stored(tmp_path, content):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content())
    images, labels = read_batch(tmp_path, "test_batch")
    assert np.array_equal(images.reshape(10_000, -1), IMAGES)
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "."])
def test_binary_batches_hold_what_was_stored(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    rows = np.concatenate([LABELS[:, None].astype(np.uint8), IMAGES], axis=1)
    rows.tofile(tmp_path / folder / "data_batch_1.bin")
    images, labels = read_batch(tmp_path, "data_batch_1")
    assert np.array_equal(images.reshape(10_000, -1), IMAGES)
    assert np.array_equal(labels, LABELS)


class _Harmful:
    def __reduce__(self):
        return print, ("the pickle's code has run",)


@pytest.mark.parametrize("protocol", range(6))
def test_the_code_of_a_pickle_does_not_run(tmp_path, capsys, protocol):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": _Harmful()}, protocol))
    with pytest.raises(EnvironmentFault, match=r"print, which is never loaded"):
        read_batch(tmp_path, "test_batch")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": IMAGES[:5], b"labels": [0] * 5},
        {b"data": IMAGES.astype(np.float32)[:2], b"labels": [0] * 2},
        {b"data": [1, 2], b"labels": [0] * 2},
        {b"labels": [0]},
        [],
        {b"data": IMAGES, b"labels": [11] * 10_000},
        {b"data": IMAGES, b"labels": []},
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, batch):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, 4))
    with pytest.raises(EnvironmentFault, match="test_batch"):
        read_batch(tmp_path, "test_batch")


@pytest.mark.parametrize("n_bytes", [0, 1, 1000])
def test_a_truncated_pickle_is_refused(tmp_path, n_bytes):
    (tmp_path / "test_batch").write_bytes(old_python_pickle()[:n_bytes])
    with pytest.raises(EnvironmentFault, match="not a Python batch"):
        read_batch(tmp_path, "test_batch")


def test_a_truncated_binary_batch_is_refused_with_both_lengths(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(bytes(100))
    with pytest.raises(EnvironmentFault, match=r"30,730,000 bytes, but holds 100"):
        read_batch(tmp_path, "test_batch")


def test_a_missing_batch_is_named_with_its_source(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"data_batch_3 .*University of Toronto"):
        read_batch(tmp_path, "data_batch_3")
