import pytest
import torch

from search.cache import cache_folder, cached_weights, weights_path


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BITFRONT_CACHE", str(tmp_path))
    return tmp_path


def weights():
    return {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


def test_weights_are_made_once_and_read_back_equal():
    made = cached_weights("a", {"seed": 0}, weights)
    read = cached_weights("a", {"seed": 0}, lambda: pytest.fail("made twice"))
    assert all(torch.equal(made[key], read[key]) for key in weights())


def test_another_recipe_has_another_file():
    assert weights_path("a", {"seed": 0}) != weights_path("a", {"seed": 1})
    assert weights_path("a", {"x": 1, "y": 2}) == weights_path("a", {"y": 2, "x": 1})


@pytest.mark.parametrize("n_bytes", [0, 4, 60])
def test_a_damaged_file_is_made_again(n_bytes):
    cached_weights("a", {}, weights)
    path = weights_path("a", {})
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert torch.equal(cached_weights("a", {}, weights)["w"], weights()["w"])
    cached_weights("a", {}, lambda: pytest.fail("not repaired"))


def test_nothing_but_the_weights_is_left_behind(folder):
    cached_weights("a", {}, weights)
    assert [p.suffix for p in folder.rglob("*") if p.is_file()] == [".safetensors"]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(folder, monkeypatch, caplog):
    (folder / "file").write_text("")
    monkeypatch.setenv("BITFRONT_CACHE", str(folder / "file"))
    assert "w" in cached_weights("a", {}, weights)
    assert "BITFRONT_CACHE" in caplog.text


def test_the_folder_is_the_operating_systems_unless_chosen(monkeypatch):
    monkeypatch.delenv("BITFRONT_CACHE")
    assert "bitfront" in str(cache_folder())
    assert cache_folder().is_absolute()
