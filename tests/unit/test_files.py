"""Paths, folders and locks."""

import sys

import pytest

from ltkd_jax import files


def test_make_folder(tmp_path):
    folder = tmp_path / "a" / "b"
    assert files.make_folder(folder, "") == folder
    assert files.make_folder(folder, "").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=f"{path} cannot be made.*: give another"):
            files.make_folder(path, "give another")


def test_lock_on_windows(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ImportError, match="Linux or macOS"), files.lock(tmp_path / "x"):
        pass


def test_text_is_utf8(tmp_path):
    """An argument that is not in the console's encoding has surrogates."""
    files.write_text(tmp_path / "x", "é \udcc3")
    assert (tmp_path / "x").read_bytes() == "é ?".encode()
