import gzip
import hashlib
import os
import stat

import numpy as np
import pytest

from fastmeta.data.digits import read_idx
from fastmeta.data.files import atomic_write, cache_dir, cached_arrays, data_dir, download_file


def test_a_write_that_is_cut_off_leaves_what_was_there(tmp_path):
    path = tmp_path / "new folder" / "file"
    with atomic_write(path) as file:
        file.write(b"whole")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"ha")
            file.flush()
            assert path.read_bytes() == b"whole"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_written_files_have_ordinary_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_arrays_are_made_once_and_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(5), "b": np.array(["x", "yz"])}

    for _ in range(2):
        arrays = cached_arrays("name", make)
        assert arrays["a"].tolist() == [0, 1, 2, 3, 4]
        assert arrays["b"].tolist() == ["x", "yz"]
    assert len(made) == 1
    path = tmp_path / "name.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert cached_arrays("name", make)["a"].sum() == 10
    path.write_bytes(b"")
    assert cached_arrays("name", make)["a"].sum() == 10
    assert len(made) == 3
    cached_arrays("name", make)
    assert len(made) == 3


def test_a_cache_that_cannot_be_written_is_told_and_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"not a folder")
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Set FASTMETA_CACHE to a folder that can be written"):
        arrays = cached_arrays("name", lambda: {"a": np.arange(3)})
    assert arrays["a"].sum() == 3


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", "~/somewhere")
    assert cache_dir() == cache_dir().home() / "somewhere"
    monkeypatch.delenv("FASTMETA_CACHE")
    assert cache_dir().name == "fastmeta"


def test_where_data_is(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    with pytest.raises(ValueError, match=r"omniglot: root must be a folder, .*FASTMETA_DATA"):
        data_dir(None, "omniglot")
    monkeypatch.setenv("FASTMETA_DATA", str(tmp_path))
    assert data_dir(None, "omniglot") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"an existing folder, got .*nowhere"):
        data_dir(tmp_path / "nowhere", "omniglot")


def test_downloads_are_checked(tmp_path):
    source, path = tmp_path / "source", tmp_path / "data" / "file"
    source.write_bytes(b"content" * 1000)
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"sha256 {'0' * 64}, got {right}; nothing was kept"):
        download_file(source.as_uri(), path, "0" * 64)
    assert os.listdir(path.parent) == []
    download_file(source.as_uri(), path, right)
    assert path.read_bytes() == source.read_bytes()
    # What is there is not fetched again.
    source.unlink()
    download_file(source.as_uri(), path, right)


def test_no_network_is_told_with_the_way_out(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=f"cannot download http://127.0.0.1:9/x: .*put it at {path}"):
        download_file("http://127.0.0.1:9/x", path, "0" * 64)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("offset", "flip"), [(8, 1), (10, 0xFF)], ids=["encrypted", "method"])
def test_a_flipped_byte_in_a_cache_is_damage(offset, flip, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    made = {"a": np.arange(6)}
    cached_arrays("x", lambda: made)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[data.rfind(b"PK\1\2") + offset] ^= flip
    (tmp_path / "x.npz").write_bytes(data)
    assert np.array_equal(cached_arrays("x", lambda: made)["a"], made["a"])


def test_a_damaged_gzip_file_is_told(tmp_path):
    data = bytearray(gzip.compress(bytes(1000)))
    data[10] = 0xFF
    (tmp_path / "x-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged gzip file"):
        read_idx(tmp_path / "x-idx3-ubyte.gz")
