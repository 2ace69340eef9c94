import gzip
import struct

import numpy as np
import pytest

from quant_ops.errors import EnvironmentFault
from search.tasks.idx_files import find_idx, read_idx

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = bytes((0, 0, 8, 3)) + struct.pack(">3I", *VALUES.shape) + VALUES.tobytes()


@pytest.mark.parametrize(("name", "pack"), [("a", bytes), ("a.gz", gzip.compress)])
def test_values_are_those_that_were_stored(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(CONTENT))
    assert np.array_equal(read_idx(find_idx(tmp_path, "a", "its site"), 3), VALUES)


@pytest.mark.parametrize("n_bytes", range(len(CONTENT)))
def test_every_truncation_is_refused(tmp_path, n_bytes):
    (tmp_path / "a").write_bytes(CONTENT[:n_bytes])
    with pytest.raises(EnvironmentFault, match="get it again"):
        read_idx(tmp_path / "a", 3)


@pytest.mark.parametrize("n_bytes", [0, 5, 30])
def test_truncated_gzip_is_refused(tmp_path, n_bytes):
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT)[:n_bytes])
    with pytest.raises(EnvironmentFault, match="get it again"):
        read_idx(tmp_path / "a.gz", 3)


def test_another_number_of_dimensions_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    with pytest.raises(EnvironmentFault, match="in 1 dimensions"):
        read_idx(tmp_path / "a", 1)


def test_missing_file_is_named_with_its_source(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"or a\.gz\) does not exist; get it from its site"):
        find_idx(tmp_path, "a", "its site")
